"""Nested values apart from their tensors."""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree


class Nesting:
    """How the tensors of an argument or an output are nested; immutable, so copies share it.

    (A `TreeSpec` itself warns when it is copied or unpickled in torch 2.13, so that a value of the
    same nesting is written in its place.)
    """

    def __init__(self, spec: pytree.TreeSpec) -> None:
        self._spec = spec

    @classmethod
    def of(cls, value: Any) -> Nesting:
        """The nesting of `value`."""
        return cls(pytree.tree_structure(value))

    @classmethod
    def split(cls, value: Any) -> tuple[list[Any], Nesting]:
        """The leaves of `value`, and how they were nested."""
        leaves, spec = pytree.tree_flatten(value)
        return leaves, cls(spec)

    @property
    def is_leaf(self) -> bool:
        """Whether it is one tensor, not nested at all."""
        return self._spec.is_leaf()

    def fill(self, leaves: list[Any]) -> Any:
        """The nested value with these leaves."""
        return pytree.tree_unflatten(leaves, self._spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Nesting) and self._spec == other._spec

    def __hash__(self) -> int:
        return hash(self._spec.num_leaves)

    def __repr__(self) -> str:
        return str(self._spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Nesting:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Nesting.of, (self.fill(list(range(self._spec.num_leaves))),)
