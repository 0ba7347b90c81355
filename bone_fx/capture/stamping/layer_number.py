"""The number of a layer, which notes whether the layer's code reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _reading(name: str) -> Callable[..., Any]:
    """An operator of int that notes that the number was read."""
    function = getattr(int, name)

    def read(self: LayerNumber, *others: Any) -> Any:
        self.read = True
        plain = [o.value if isinstance(o, LayerNumber) else o for o in others]
        return function(self.value, *plain)

    return read


class LayerNumber:
    """The number of a layer in the place of the integer, which notes whether anybody reads it."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.read = False


_OPERATORS = (
    "index int float bool hash eq ne lt le gt ge add radd sub rsub mul rmul mod rmod "
    "floordiv rfloordiv truediv rtruediv pow rpow neg abs and rand or ror xor lshift "
    "rshift str repr format divmod"
)
for _operator in _OPERATORS.split():
    setattr(LayerNumber, f"__{_operator}__", _reading(f"__{_operator}__"))
