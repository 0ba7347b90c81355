"""Rotary embeddings: tables and convention from the model's own module and function.

Two things are watched while a model runs. A module without parameters that turns the token
positions into a pair of tensors gives the tables: a copy of it is run on the positions 0 .. M - 1.
A function with parameters `cos` and `sin` applies them: it is run on random data and compared with
the known conventions. Where both are recognised the graph gets one RotaryEmbedding in place of the
function; otherwise the model's own code stays in the graph, which is always right.

Where longer texts have other angles the choice is the model's own: the longest text of the batch,
tokens of the cache included, decides for the whole batch and the new tokens alone; keys that are in
the cache stay as they were rotated. Longrope so has two tables in one, and dynamic NTK the one
that holds up to max_position_embeddings; `tables.tables_of` refuses the rest.

Shape letters: B batch, H heads, S new tokens, D head size, R rotary width (R <= D), M positions in
a table.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from types import FunctionType, ModuleType
from typing import Any, TypeGuard

import torch
from torch import SymInt, Tensor, nn
from torch.nn import functional

from bone_fx.capture.decoder.ort_operators import rotary_embedding, rows_by_length
from bone_fx.capture.decoder.rotary.conventions import Convention, recognise_rotation
from bone_fx.capture.decoder.rotary.tables import RotaryTables, rows_of, tables_of
from bone_fx.capture.trace.outside_trace import untraced
from bone_fx.errors import CaptureError


class RotaryWatcher:
    """Recognises the rotary embeddings of one model while it runs.

    Args:
        model: The model, with real buffers.
        length: Number of positions in the tables, M.
        dtype: The dtype of the graph.
    """

    def __init__(self, model: nn.Module, length: int, dtype: torch.dtype) -> None:
        self.length = length
        self.dtype = dtype
        self.notes: list[str] = []
        self.positions: Tensor | None = None
        self.valid_B: Tensor | None = None
        self.total: tuple[Tensor, int | SymInt] | None = None
        self.tables: list[tuple[Tensor, Tensor]] = []
        self._twins = {m: _copy(m) for m in model.modules() if _may_make_tables(m)}
        self._tables: dict[int, tuple[Tensor, RotaryTables]] = {}
        self._made: dict[tuple[nn.Module, str], RotaryTables] = {}
        self._conventions: dict[tuple[object, ...], Convention | None] = {}
        self._cut: dict[int, tuple[Tensor, Tensor]] = {}
        self._probing = False
        self._functions = _functions_with_cos_and_sin(model)

    def begin(self, positions: Tensor, valid_B: Tensor, total: tuple[Tensor, int | SymInt]) -> None:
        """A forward begins.

        Args:
            positions: Those of its tokens, `[B, S]`.
            valid_B: Tokens of each row, those in the cache included.
            total: T, the width of the mask, as an int32 tensor and as a number.
        """
        self.positions, self.valid_B, self.total = positions, valid_B, total
        self._cut.clear()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches modules and functions for as long as the context is open."""
        for module in self._twins:
            vars(module)["forward"] = _Watched(self, module)
        originals: list[tuple[ModuleType, str, FunctionType]] = []
        for space, name, function in self._functions:
            originals.append((space, name, function))
            setattr(space, name, self._instead_of(function))
        try:
            yield
        finally:
            for space, name, function in originals:
                setattr(space, name, function)
            for module in self._twins:
                del vars(module)["forward"]
            self._tables.clear()
            self._made.clear()
            self._cut.clear()
            self.positions = self.valid_B = self.total = None

    def make(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module gives, remembered if it is a pair of rows for the token positions."""
        tables = self._tables_for(module, args, kwargs)
        if tables is not None and tables.fixed:
            assert self.positions is not None
            chosen = self._chosen(tables.as_made(), tables.switch)
            output: Any = tuple(functional.embedding(self.positions, table) for table in chosen)
        else:
            output = type(module).forward(module, *args, **kwargs)
        if _is_pair(output):
            if tables is None:
                name = type(module).__name__
                self.notes.append(f"{name}: positions of its own, kept in the graph")
            else:
                self._tables[id(output[0])] = (output[0], tables)
        return output

    def _tables_for(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> RotaryTables | None:
        """Makes the tables before the module is traced, which fails for some."""
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        integers = [t for t in tensors if not t.is_floating_point()]
        if len(integers) != 1 or integers[0] is not self.positions:
            return None
        plain = [a for a in args if not isinstance(a, Tensor)]
        plain += [item for item in kwargs.items() if not isinstance(item[1], Tensor)]
        how = (module, repr(plain))
        if how not in self._made:
            rows = rows_of(self._twins[module], args, kwargs)
            try:
                pair = untraced(lambda: tables_of(rows, self.length, self.dtype, module))
            except (TypeError, ValueError, RuntimeError, IndexError):
                return None  # it takes positions and gives something else than cos and sin
            self._made[how] = pair
            self._note_choice(module, pair)
        return self._made[how]

    def _instead_of(self, function: FunctionType) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._probing:
                return function(*args, **kwargs)
            try:
                arguments = signature.bind(*args, **kwargs).arguments
            except TypeError:
                return function(*args, **kwargs)
            emitted = self._emit(function, arguments)
            return function(*args, **kwargs) if emitted is None else emitted

        return watched

    def _emit(self, function: FunctionType, arguments: dict[str, Any]) -> Any:
        entry = self._tables.get(id(arguments["cos"]))
        rotated = {
            name: value
            for name, value in arguments.items()
            if name not in ("cos", "sin") and isinstance(value, Tensor) and value.dim() == 4
        }
        if entry is None or self.positions is None or not rotated:
            self.notes.append(f"{function.__name__}: tables not recognised, kept in the graph")
            return None
        axes = {_sequence_axis(x) for x in rotated.values()}
        axis = axes.pop() if len(axes) == 1 else None
        convention = axis and self._recognise(function, arguments, rotated, entry[1], axis)
        if not axis or not convention:
            self.notes.append(f"{function.__name__}: convention not recognised, kept in the graph")
            return None
        cos, sin = self._chosen(self._interned(entry[1].angles(convention.layout)), entry[1].switch)
        outputs = []
        for x in rotated.values():
            heads_first = x if axis == 2 else x.transpose(1, 2)
            y = rotary_embedding(
                heads_first, self.positions, cos, sin, interleaved=convention.interleaved
            )
            outputs.append(y if axis == 2 else y.transpose(1, 2))
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def _note_choice(self, module: nn.Module, tables: RotaryTables) -> None:
        name = type(module).__name__
        if tables.switch is not None:
            self.notes.append(
                f"{name}: one table for batches of at most {tables.switch} tokens a row, one for "
                "longer ones, as the model has it; keys in the cache stay as they were rotated"
            )
        elif tables.fixed:
            self.notes.append(
                f"{name}: angles are those of texts of at most {tables.length} tokens, which is "
                "all that the graph holds for"
            )

    def _chosen(self, tables: tuple[Tensor, Tensor], switch: int | None) -> tuple[Tensor, Tensor]:
        """The rows for the length of the batch, cut once for all layers."""
        if switch is None:
            return tables
        assert self.valid_B is not None
        assert self.total is not None
        if id(tables) not in self._cut:
            longest_1 = self.valid_B.amax(0, keepdim=True).to(torch.int32)
            self._cut[id(tables)] = rows_by_length(tables, longest_1, *self.total, switch)
        return self._cut[id(tables)]

    def _interned(self, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The first pair of equal tables seen: layers that turn alike share one constant."""
        for earlier in self.tables:
            if earlier is angles or untraced(partial(_same_tables, earlier, angles)):
                return earlier
        self.tables.append(angles)
        return angles

    def _recognise(
        self,
        function: FunctionType,
        arguments: dict[str, Any],
        rotated: dict[str, Tensor],
        tables: RotaryTables,
        axis: int,
    ) -> Convention | None:
        sizes = tuple((int(x.shape[3 - axis]), int(x.shape[3])) for x in rotated.values())
        others = {
            k: v for k, v in arguments.items() if k not in rotated and k not in ("cos", "sin")
        }
        key = (function, sizes, axis, id(tables), repr(others))
        if key not in self._conventions:
            self._probing = True  # functions that this one calls run as they are
            self._conventions[key] = untraced(
                lambda: recognise_rotation(
                    function, others, dict(zip(rotated, sizes, strict=True)), tables, axis
                )
            )
            self._probing = False
        return self._conventions[key]


@dataclass
class _Watched:
    """Stands before the forward of a module that may make tables."""

    watcher: RotaryWatcher
    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.watcher.make(self.module, args, kwargs)


def _is_pair(output: object) -> TypeGuard[tuple[Tensor, Tensor]]:
    return isinstance(output, tuple) and [isinstance(t, Tensor) and t.dim() for t in output] == [
        3,
        3,
    ]


def _same_tables(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def _sequence_axis(x: Tensor) -> int | None:
    axes = [axis for axis in (1, 2) if isinstance(x.shape[axis], SymInt)]
    return axes[0] if len(axes) == 1 else None


def _may_make_tables(module: nn.Module) -> bool:
    return (
        not module._modules
        and not any(p is not None for p in module._parameters.values())
        and "position_ids" in inspect.signature(module.forward).parameters
    )


def _copy(module: nn.Module) -> nn.Module:
    for name, buffer in module.named_buffers():
        if type(buffer) is not Tensor or buffer.is_meta:
            raise CaptureError(
                f"buffer {name} of {type(module).__name__} has no value",
                expected="a model without weights whose buffers are real",
            )
    return copy.deepcopy(module)


def _functions_with_cos_and_sin(model: nn.Module) -> list[tuple[ModuleType, str, FunctionType]]:
    names = {
        base.__module__
        for module in model.modules()
        for base in type(module).__mro__
        if base.__module__.split(".")[0] not in ("torch", "builtins")
    }
    places = []
    for name in sorted(names):
        space = sys.modules.get(name)
        for attribute, value in list(vars(space).items()) if space else []:
            if isinstance(value, FunctionType) and {"cos", "sin"} <= set(
                inspect.signature(value).parameters
            ):
                assert space is not None
                places.append((space, attribute, value))
    return places
