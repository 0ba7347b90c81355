"""A model's output whose logits are formed when something other than its loss is read.

A training step reads the loss alone. The output has a class of its own until then, and the model's
from then on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

_FORM = "_form_logits"


def with_lazy_logits(output: Any, form: Callable[[], Tensor]) -> Any:
    """The output, whose `logits` become what `form` returns when they are read.

    Args:
        output: A `ModelOutput` with `loss` as its first field, and anything for `logits`.
        form: Called once at most.
    """
    output.__dict__[_FORM] = form
    cls: Any = type(output)
    output.__class__ = _lazy_class(cls)
    return output


@functools.cache
def _lazy_class(cls: Any) -> Any:
    return type(cls.__name__, (_LazyLogits, cls), {"__slots__": (), "__module__": cls.__module__})


class _LazyLogits:
    """What an output class does differently while the logits are not formed."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        plain = name in ("loss", "__class__", "__dict__")
        return object.__getattribute__(self if plain else _formed(self), name)

    def __getitem__(self, key: Any) -> Any:
        return self.__dict__["loss"] if key in ("loss", 0) else _formed(self)[key]

    def __setitem__(self, key: str, value: Any) -> None:
        _formed(self)[key] = value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_formed(self), name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _formed(self).__reduce_ex__(protocol)


def _formed(output: Any) -> Any:
    """The same output with its logits, and of the model's class again."""
    form = output.__dict__.get(_FORM)
    logits = None if form is None else form()  # may raise: then the next read asks again
    output.__dict__.pop(_FORM, None)
    object.__setattr__(output, "__class__", type(output).__bases__[1])
    if form is not None:
        output["logits"] = logits
    return output
