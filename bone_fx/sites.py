"""Linear sites, and which of them a configuration targets by PEFT 0.18.1's rules."""

from __future__ import annotations

import math
import re
import reprlib
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import regex
from torch import nn

from bone_fx.adapters import METHODS
from bone_fx.config import ALL_LINEAR, BoneConfig
from bone_fx.errors import SiteError

UNMATCHED = "this target matched no linear layer"
"""Why an entry of a list of targets is refused."""

_LINEAR_MODULES = ("Linear", "Conv1D")


class Targets(Protocol):
    """What a configuration says of the layers that it targets, whatever its method."""

    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    modules_to_save: list[str] | None
    base_model_name_or_path: str | None


@dataclass(frozen=True)
class LinearSite:
    """A linear layer that an adapter can sit on.

    Attributes:
        name: The layer's original dotted name, such as `model.layers.0.mlp.up_proj`.
        weight_name: Dotted name of the weight parameter.
        in_features: I.
        out_features: O.
        transposed: Whether the weight is stored `[I, O]` (HF `Conv1D`) rather than `[O, I]`.
        module_type: Class name of the module that owns the weight, or None if the graph does not
            say.
        experts: Number of weights that are stacked in one parameter `[E, O, I]`; 0 for one alone.
    """

    name: str
    weight_name: str
    in_features: int
    out_features: int
    transposed: bool = False
    module_type: str | None = None
    experts: int = 0

    @property
    def is_layer(self) -> bool:
        """Whether this is a linear layer, no bare parameter and no other module's weight."""
        owned = self.weight_name == f"{self.name}.weight"
        return owned and (
            self.module_type is None or any(kind in self.module_type for kind in _LINEAR_MODULES)
        )

    @property
    def block_owner(self) -> str:
        """Dotted name under which block parameters are mounted.

        A bare parameter cannot own any itself.
        """
        return self.name if self.weight_name != self.name else f"{self.name}_site"


@dataclass(frozen=True)
class Refusal:
    """Something that was asked for and not done.

    Attributes:
        name: Site, parameter or target.
        reason: Why.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def is_target(config: Targets, name: str) -> bool:
    """Whether PEFT's rules for names choose `name`.

    `"all-linear"` chooses every name that is not excluded.
    """
    if is_excluded(config, name) or config.target_modules is None:
        return False
    if config.target_modules == ALL_LINEAR:
        return True
    if name in config.target_modules and isinstance(config.target_modules, list):
        return True  # a whole name is taken as it is, whatever layers_to_transform says
    if not _listed(config.target_modules, name):
        return False
    return _in_layers(config, name)


def is_excluded(config: Targets, name: str) -> bool:
    """Whether `exclude_modules` or `modules_to_save` keeps `name` from being a target."""
    return _listed(config.exclude_modules, name) or is_saved_module(config, name)


def is_saved_module(config: Targets, name: str) -> bool:
    """Whether PEFT takes `name` for a part of `modules_to_save` when it chooses targets."""
    return any(
        _match(module, rf"(^|.*\.){module}($|\..*)", name)
        for module in config.modules_to_save or ()
    )


def is_trained_whole(config: Targets, parameter: str) -> bool:
    """Whether PEFT trains a copy of a parameter: it lies in a module that an entry names.

    PEFT 0.18.1 compares ends of letters here, not names: `norm` is `input_layernorm` too.
    """
    return any(trains_module(config, path) for path in modules_above(parameter))


def trains_module(config: Targets, module: str) -> bool:
    """Whether an entry of `modules_to_save` is an end of a module's name."""
    return any(module.endswith(entry) for entry in config.modules_to_save or ())


def modules_above(parameter: str) -> list[str]:
    """Names of the modules that a parameter lies in, the outermost first."""
    *modules, _ = parameter.split(".")
    return [".".join(modules[: depth + 1]) for depth in range(len(modules))]


def select_sites(
    config: Targets,
    sites: Iterable[LinearSite],
    others: Iterable[Refusal] = (),
    output_layers: Collection[str] = (),
) -> tuple[list[LinearSite], list[Refusal]]:
    """Choose the sites that a configuration targets.

    Args:
        config: The configuration; `target_modules` must be set.
        sites: All sites of a model, in order.
        others: Parameters that are no sites, with the reason; those that are targeted come back as
            refused.
        output_layers: Names that `"all-linear"` leaves out, as PEFT leaves out a model's output
            layer.

    Returns:
        The chosen sites in order, and what was asked for but refused.

    Raises:
        SiteError: Nothing at all was matched.
    """
    sites = list(sites)
    if config.target_modules is None:
        raise SiteError(
            "target_modules is not set",
            expected="a list of names, a regular expression or 'all-linear'",
            next_step=f"choose among: {_examples(sites)}",
        )
    if config.target_modules == ALL_LINEAR:
        chosen = [
            s
            for s in sites
            if s.is_layer and s.name not in output_layers and is_target(config, s.name)
        ]
        refused: list[Refusal] = []
    else:
        chosen = [s for s in sites if is_target(config, s.name)]
        refused = [
            o
            for o in others
            if is_target(config, o.name) or is_target(config, o.name.rpartition(".")[0])
        ]
        refused += _unmatched(config, [*(s.name for s in chosen), *(r.name for r in refused)])
    if not chosen:
        base = config.base_model_name_or_path
        raise SiteError(
            f"target_modules={config.target_modules!r} matched no linear layer",
            expected=f"names such as {_examples(sites)}",
            found="; ".join(map(str, refused[:5])) or "no match",
            next_step="correct target_modules, exclude_modules or layers_to_transform"
            + (f", or give the base that the configuration names, {base}" if base else ""),
        )
    both = [s.name for s in chosen if is_trained_whole(config, s.weight_name)]
    if both:
        raise SiteError(
            f"modules_to_save={config.modules_to_save} also names an adapted layer, {both[0]}",
            expected="layers that are adapted, or modules that are trained whole",
            next_step="write the whole name in modules_to_save, or leave the layer out with "
            "exclude_modules",
        )
    return chosen, refused


def check_fit(config: BoneConfig, site: LinearSite) -> None:
    """Refuse a block that cannot fit a layer.

    Raises:
        SiteError: The layer, the rule, and values that would fit.
    """
    reason = METHODS[config.method].refusal(
        site.in_features, site.out_features, config.r, config.mini_r
    )
    if reason:
        raise SiteError(
            f"{site.name}: {reason}",
            next_step="change it, or leave the layer out with exclude_modules",
        )


def matches_end(pattern: str, name: str) -> bool:
    """Whether a pattern is a name or the end of one behind a dot, as PEFT reads rank patterns.

    Raises:
        SiteError: It is no regular expression, or takes too long.
    """
    if _PLAIN.fullmatch(pattern):  # most are names; in these a dot stands for any letter too
        end, before = name[-len(pattern) :], name[: -len(pattern)]
        fits = all(a in (".", b) for a, b in zip(pattern, end, strict=False))
        return len(end) == len(pattern) and fits and (not before or before.endswith("."))
    return _match(pattern, rf"(.*\.)?({pattern})$", name) is not None


def _unmatched(config: Targets, names: list[str]) -> list[Refusal]:
    """Entries of a target list that chose nothing."""
    if not isinstance(config.target_modules, list):
        return []
    return [
        Refusal(target, UNMATCHED)
        for target in config.target_modules
        if not any(
            n == target or n.endswith(f".{target}") or f".{target}." in f".{n}." for n in names
        )
    ]


def _listed(entries: list[str] | str | None, name: str) -> bool:
    if not entries:
        return False
    if isinstance(entries, str):
        return _match(entries, entries, name, whole=True) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def _in_layers(config: Targets, name: str) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns: list[str] = [r"[^.]*"]
    if config.layers_pattern:
        patterns = (
            [config.layers_pattern]
            if isinstance(config.layers_pattern, str)
            else config.layers_pattern
        )
    matches = (_match(p, rf".*\.{p}\.(\d+)\.", name) for p in patterns)
    numbered = next((match for match in matches if match), None)
    if numbered is None:
        return False
    number = numbered.group(1)
    if not number or not number.isdecimal():
        raise SiteError(
            f"layers_pattern {patterns} has a group of its own",
            expected="the name of a list of layers",
            next_step="leave the parentheses out",
        )
    return int(number) in ([layers] if isinstance(layers, int) else layers)


_LONGEST_PATTERN = 10_000
_MOST_REPEATS = 100_000
"""A pattern that repeats a part so often at least is unfolded to as many when it is compiled."""
_SECONDS = 0.05
"""Of processor time for one name; an ordinary pattern takes microseconds."""
_PLAIN = re.compile(r"[\w.]+")
_REPEAT = re.compile(r"\{(\d+)")


def _match(field: str, pattern: str, name: str, *, whole: bool = False) -> regex.Match[str] | None:
    """The match of a pattern that was made of what a configuration gives.

    PEFT matches with `re`, which some patterns keep busy for longer than the universe is old.
    `regex` gives the same answers and can be stopped.

    Raises:
        SiteError: It is no pattern of `re`, or takes too long.
    """
    compiled = _compiled(field, pattern)
    try:
        match = compiled.fullmatch if whole else compiled.match
        return match(name, timeout=_SECONDS)
    except (TimeoutError, RecursionError, MemoryError):
        raise SiteError(
            f"the regular expression {reprlib.repr(field)} takes too long on {name!r}",
            expected="one without nested repeats, such as `(a+)+`",
            next_step="correct it in the adapter's configuration, or list the names",
        ) from None


@lru_cache(maxsize=64)
def _compiled(field: str, pattern: str) -> regex.Pattern[str]:
    repeats = math.prod(max(1, int(n[:9])) for n in _REPEAT.findall(pattern[:_LONGEST_PATTERN]))
    if len(pattern) > _LONGEST_PATTERN or repeats > _MOST_REPEATS:
        raise _no_pattern(field, "it is too large")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)  # what only `regex` knows is no pattern of PEFT's
            return regex.compile(pattern)
    except (ValueError, OverflowError, RecursionError, re.error, regex.error) as error:
        raise _no_pattern(field, str(error)) from None


def _no_pattern(field: str, why: str) -> SiteError:
    return SiteError(
        f"{reprlib.repr(field)} is not a regular expression",
        found=why,
        next_step="correct it in the adapter's configuration",
    )


def _examples(sites: list[LinearSite]) -> str:
    endings = dict.fromkeys(s.name.rpartition(".")[2] for s in sites)
    return ", ".join(list(endings)[:12]) or "none: the graph has no linear layer"


_HEADS = ("score", "classifier")
"""Names under which PEFT 0.18.1 looks for a sequence classifier's head (`SEQ_CLS_HEAD_NAMES`)."""


def output_layers(model: nn.Module, task_type: str | None) -> frozenset[str]:
    """What PEFT 0.18.1 leaves out of `"all-linear"`.

    The output embeddings, or a sequence classifier's head.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None and task_type == "SEQ_CLS":
        head = next((h for name in _HEADS if (h := getattr(model, name, None)) is not None), None)
    return frozenset(
        name for name, module in model.named_modules() if head is not None and module is head
    )
