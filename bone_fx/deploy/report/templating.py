"""Templates: everything that comes from a file is escaped where it is printed."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any

from bone_fx.errors import printable

if TYPE_CHECKING:
    from jinja2 import Environment

_MARKS = re.compile(r"([\\`*_\[\]|~^$])")
_START = re.compile(r"^(\d+[.)]|[#+=-]+)(?=\s|$)")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


class Plain(str):
    """Text of a model card that is printed as it is."""

    __slots__ = ()


@cache
def html_templates() -> Environment:
    """The environment of pages: names are escaped, what does not print is written as an escape."""
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        is_text = isinstance(value, str) and not isinstance(value, Markup)
        return printable(value) if is_text else value

    return _environment(autoescape=True, finalize=finalize)


@cache
def markdown_templates() -> Environment:
    """The environment of model cards: names cannot become Markdown or HTML.

    Filters: `code` (a span of code), `python` (a string in Python), `yaml` (one in YAML), `raw`
    (text of ours).
    """

    def finalize(value: Any) -> Any:
        is_text = isinstance(value, str) and not isinstance(value, Plain)
        return _escaped(value) if is_text else value

    environment = _environment(autoescape=False, finalize=finalize)
    environment.filters.update(code=_code, python=_python, raw=Plain, yaml=_yaml)
    return environment


def _environment(*, autoescape: bool, finalize: Any) -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("bone_fx.deploy.report"),
        autoescape=autoescape,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(nbytes=nbytes)
    return environment


def nbytes(count: int) -> str:
    """A number of bytes as a person reads it."""
    size = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def _escaped(text: str) -> str:
    line = _MARKS.sub(r"\\\1", printable(text, lines=False))
    line = _START.sub(lambda mark: f"{mark[0][:-1]}\\{mark[0][-1]}", line)
    return "".join(_ENTITIES.get(c, c) for c in line)


def _code(text: str) -> Plain:
    """A span of code that holds any text, in a table too."""
    line = printable(str(text), lines=False).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return Plain(f"{fence}{padding}{line}{padding}{fence}")


def _python(text: str) -> Plain:
    return Plain(ascii(text))


def _yaml(text: str) -> Plain:
    """YAML's double-quoted strings are JSON's."""
    return Plain(json.dumps(printable(text, lines=False)))
