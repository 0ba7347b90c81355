"""Weights that are read when an operator asks for them: a model that is larger than the memory.

A `StreamedWeight` stands in a module in the place of a parameter and knows its shape and dtype.
Whatever operator takes it gets the weight itself, wherever in a model's code that is: nothing has
to be known of the modules. As many weights stay in memory as there is room for; of the others those
of one module are there at a time, and of a table of embeddings the rows that are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bone_fx.errors import VerificationError

Load = Callable[[], Tensor]
Rows = Callable[[Tensor], Tensor]
_LOOK_UP = torch.ops.aten.embedding.default


class Room:
    """The memory that streamed weights share.

    What comes first stays: a model asks for its weights in the same order every time, and whatever
    went to make place would be what is asked for next.

    Args:
        nbytes: Bytes of weights that may stay in memory.
    """

    def __init__(self, nbytes: int) -> None:
        self._free = nbytes
        self._staying: dict[object, Tensor] = {}
        self._passing: dict[object, Tensor] = {}
        self._module = ""

    def tensor(self, key: object, module: str, load: Load) -> Tensor:
        """A weight of a module, loaded if it is not there; what others passed through goes."""
        if key in self._staying:
            return self._staying[key]
        if module != self._module:
            self._passing.clear()
            self._module = module
        if key not in self._passing:
            loaded = load()
            if loaded.nbytes > self._free:
                self._passing[key] = loaded
                return loaded
            self._free -= loaded.nbytes
            self._staying[key] = loaded
            return loaded
        return self._passing[key]

    def may_stay(self, key: object, nbytes: int) -> bool:
        """Whether a weight stays in memory when it is loaded."""
        return key in self._staying or nbytes <= self._free

    def drop(self, key: object) -> None:
        """Forget a weight, which is another from now on."""
        self._passing.pop(key, None)
        left = self._staying.pop(key, None)
        if left is not None:
            self._free += left.nbytes


class StreamedWeight(nn.Parameter):
    """A parameter whose values are read when an operator takes it.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        load: Reads the values; called again whenever they are needed and not in memory.
        room: The memory that it shares with other weights.
        module: Name of the module that it belongs to.
        rows: Reads some rows of a table, of which no more is loaded then.
    """

    _load: Load
    _rows: Rows | None
    _room: Room
    _module: str
    _key: object  # not the weight itself: tensors are equal by their values

    # A tensor's class takes its arguments here; `nn.Parameter` has others.
    def __new__(  # noqa: D102 - documented on the class
        cls,
        shape: torch.Size,
        dtype: torch.dtype,
        load: Load,
        room: Room,
        module: str,
        rows: Rows | None = None,
    ) -> Self:
        make: Any = torch.Tensor._make_wrapper_subclass
        weight: Self = make(cls, shape, dtype=dtype, device="cpu", requires_grad=False)
        weight._load, weight._rows, weight._module = load, rows, module
        weight._room, weight._key = room, object()
        return weight

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __repr__(self) -> str:  # type: ignore[override]  # of Tensor, which prints values
        return f"StreamedWeight({self._module}, {list(self.shape)})"

    def loaded(self) -> Tensor:
        """The values."""
        return self._room.tensor(self._key, self._module, self._load)

    def looked_up(self, ids: Tensor) -> Tensor:
        """The rows with these numbers."""
        if self._rows is None or self._room.may_stay(self._key, self.numel() * self.itemsize):
            return nn.functional.embedding(ids, self.loaded())
        numbers, places = torch.unique(ids, return_inverse=True)
        return nn.functional.embedding(places, self._rows(numbers))

    def change(self, make: Callable[[Tensor], Tensor]) -> None:
        """Give the weight other values: what a function makes of its own, whenever it is loaded."""
        before = self._load
        self._load, self._rows = lambda: make(before()), None
        self._room.drop(self._key)

    def replaced(self, load: Load) -> StreamedWeight:
        """Another weight of the same shape, in the same room."""
        self._room.drop(self._key)
        return StreamedWeight(self.shape, self.dtype, load, self._room, self._module)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types the disabled form of it
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator with the values.

        Raises:
            VerificationError: The operator writes into the weight.
        """
        del types
        if func is _LOOK_UP and isinstance(args[0], StreamedWeight):
            return args[0].looked_up(args[1])
        for place, argument in enumerate(func._schema.arguments):
            given = args[place] if place < len(args) else (kwargs or {}).get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(given, StreamedWeight):
                raise VerificationError(
                    f"verification failed: the model writes into a weight of {given._module}, and"
                    " streamed weights are only read",
                    next_step="verify on a machine with more memory",
                )
        args, kwargs = pytree.tree_map_only(
            StreamedWeight, StreamedWeight.loaded, (args, dict(kwargs or {}))
        )
        return func(*args, **kwargs)


def change(parameter: Tensor, make: Callable[[Tensor], Tensor]) -> None:
    """Give a parameter other values: at once, or whenever they are loaded if it is streamed."""
    if isinstance(parameter, StreamedWeight):
        parameter.change(make)
        return
    with torch.no_grad():
        parameter.copy_(make(parameter.detach()))


def replacement(parameter: Tensor, values: Tensor, load: Load) -> nn.Parameter:
    """A parameter for the place of another, with its values now and how they are read again."""
    if isinstance(parameter, StreamedWeight):
        return parameter.replaced(load)
    return nn.Parameter(values, requires_grad=False)
