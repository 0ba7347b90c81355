"""How a captured graph is called like the model it came from, without holding the graph.

A captured graph takes flat tensors and gives back flat tensors. `CallSignature` stands on both
sides of it: `bind` turns the model's own call (`input_ids=...`, `attention_mask=...`, in any order,
some left out) into those tensors, and `pack` turns the tensors that come out into the model's own
output class. It is plain data: it survives folding, deepcopy and pickle, and any number of graphs
with the same inputs and outputs can share it.

Guards of the trace are gone from the graph (they would refuse one row); the sizes are checked here
instead, with the names that the caller used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bone_fx.capture.call.conditions import Conditions
from bone_fx.capture.call.nesting import Nesting
from bone_fx.errors import InputRefusedError, UsageError

_NO_EFFECT = {"use_cache": False, "return_dict": True}
"""Arguments that change nothing about a training graph, with the only value they can have."""

_LOSS_OPTIONS = ("num_items_in_batch",)
"""Arguments of the call that are for the loss."""

_BOUNDS_OF_PACKED = frozenset(
    {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
)
"""Where packed sequences begin, in the forms that kernels read; `position_ids` says it too."""


@dataclass(frozen=True)
class Argument:
    """One argument of the captured forward.

    Attributes:
        name: The keyword of the model's forward.
        nesting: The nesting of the argument (a leaf for a tensor).
        shapes: One entry a tensor in it: an int is a fixed size, a string names a size that varies,
            and sizes with the same name must be equal; None is not checked.
        ones_like: For an attention mask, the argument whose first two sizes (or, for raw audio,
            whose shape) a mask of ones takes when none is given.
    """

    name: str
    nesting: Nesting
    shapes: tuple[tuple[int | str | None, ...], ...]
    ones_like: str | None = None

    @property
    def is_tensor(self) -> bool:
        """Whether the argument is one tensor, not several in a nested value."""
        return self.nesting.is_leaf


@dataclass(frozen=True)
class CallSignature:
    """The call of a model, as data.

    Attributes:
        arguments: The arguments that are inputs of the graph, in the order of its placeholders.
        constants: Arguments whose value is part of the graph (flags, numbers), with that value.
        positional: The names that positional arguments of a call stand for.
        output: The nesting of the model's output, its class included.
        smallest: For a named size, the smallest that the graph can take.
        largest: For a named size, the largest that the graph can take (learned positions).
        conditions: What the sizes must satisfy besides (`capture.call.conditions`).
        ignored: Arguments of the call that are not for the graph (labels).
        decoder_inputs: For an encoder-decoder, makes `decoder_input_ids` from `labels` when only
            these are given.
    """

    arguments: tuple[Argument, ...]
    output: Nesting
    constants: Mapping[str, Any] = field(default_factory=dict)
    positional: tuple[str, ...] = ()
    smallest: Mapping[str, int] = field(default_factory=dict)
    largest: Mapping[str, int] = field(default_factory=dict)
    conditions: Conditions = field(default_factory=Conditions)
    ignored: tuple[str, ...] = ()
    decoder_inputs: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the graph's arguments, in order."""
        return tuple(argument.name for argument in self.arguments)

    @property
    def packs(self) -> bool:
        """Whether the graph finds packed sequences by their positions."""
        return "position_ids" in self.input_names and not any(a.ones_like for a in self.arguments)

    def bind(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The graph's inputs for a call of the model.

        Args:
            *args: Positional arguments of the model's forward.
            **kwargs: Keyword arguments of the model's forward. `labels` and the like are passed
                over, except that an encoder-decoder without `decoder_input_ids` takes these from
                `labels`, as the model does.

        Returns:
            One value a placeholder of the graph.

        Raises:
            UsageError: An argument is missing, unknown, or differs from the value that the graph
                was captured with.
            InputRefusedError: A tensor has a size that the graph cannot take.
        """
        arguments = self._by_name(args, kwargs)
        self._derive(arguments)
        missing = [name for name in self.input_names if arguments.get(name) is None]
        if missing:
            raise UsageError(
                f"the call lacks {', '.join(missing)}",
                expected=", ".join(self.input_names),
                found=", ".join(name for name, value in arguments.items() if value is not None)
                or "nothing",
            )
        self._expand_rows(arguments)
        sizes: dict[str, tuple[int, str]] = {}
        flat: list[Any] = []
        for argument in self.arguments:
            leaves, nesting = Nesting.split(arguments[argument.name])
            if nesting != argument.nesting:
                raise UsageError(
                    f"{argument.name} is nested otherwise than in the example inputs",
                    expected=argument.nesting,
                    found=nesting,
                )
            for leaf, shape in zip(leaves, argument.shapes, strict=True):
                self._check_sizes(argument.name, leaf, shape, sizes)
            flat.extend(leaves)
        self.conditions.require(arguments)
        return tuple(flat)

    def takes(self, names: Collection[str], *, is_packed: bool = False) -> bool:
        """Whether a call that brings these tensors can be bound.

        Args:
            names: What the call brings.
            is_packed: Whether its rows are packed sequences, which a mask of ones would join.
        """
        derived = {a.name for a in self.arguments if a.ones_like and not is_packed}
        if self.decoder_inputs is not None:
            derived.add("decoder_input_ids")
        return set(names) <= set(self.input_names) <= {*names, *derived}

    def tensors_of(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """The tensors among the arguments of a call of the model, by name; labels are none."""
        arguments = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        return {
            name: value
            for name, value in arguments.items()
            if isinstance(value, torch.Tensor)
            and name not in {*self.ignored, *_LOSS_OPTIONS, *_BOUNDS_OF_PACKED}
        }

    def pack(self, outputs: Any) -> Any:
        """The model's own output from the graph's flat outputs."""
        leaves = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        return self.output.fill(leaves)

    def call(self, graph: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs `graph` as the model would be called; labels are passed over."""
        return self.pack(graph(*self.bind(*args, **kwargs)))

    def labels_of(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """The labels among the arguments of a call, by name; none if there are none."""
        arguments = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        return {name: arguments[name] for name in self.ignored if arguments.get(name) is not None}

    def loss_options_of(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What a call says about the loss besides the labels, by name."""
        return {name: kwargs[name] for name in _LOSS_OPTIONS if kwargs.get(name) is not None}

    def _by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if len(args) > len(self.positional):
            raise UsageError(
                f"{len(args)} positional arguments are too many",
                expected=f"at most {len(self.positional)}: {', '.join(self.positional)}",
            )
        arguments = dict(zip(self.positional, args, strict=False))
        for name, value in kwargs.items():
            if arguments.get(name) is not None:
                raise UsageError(f"{name} is given twice, by position and by name")
            arguments[name] = value
        names = set(self.input_names)
        passed_over = set(self.ignored) | (_BOUNDS_OF_PACKED if self.packs else set())
        for name, value in arguments.items():
            if name in names or name in passed_over:
                continue
            if name in self.constants:
                if value is not None and value != self.constants[name]:
                    raise UsageError(
                        f"{name} is part of the captured graph",
                        expected=f"{self.constants[name]!r}, as in the example inputs",
                        found=repr(value),
                        next_step=f"capture again with {name}={value!r} in the example inputs",
                    )
            elif name in _NO_EFFECT:
                if value is not None and value != _NO_EFFECT[name]:
                    raise UsageError(
                        f"{name}={value!r} is not possible in a captured graph",
                        expected=_NO_EFFECT[name],
                    )
            elif value is not None and value is not False and name not in _LOSS_OPTIONS:
                raise UsageError(
                    f"{name} is not an input of the captured graph",
                    expected=", ".join(self.input_names),
                    found=name,
                    next_step=f"capture again with {name} in the example inputs",
                )
        return arguments

    def _derive(self, arguments: dict[str, Any]) -> None:
        """Fills in what a model derives when it is left out: decoder inputs, and masks of ones."""
        names = self.input_names
        labels = arguments.get("labels")
        decoder = ("decoder_input_ids", "decoder_inputs_embeds")
        if self.decoder_inputs is not None and labels is not None:
            if not any(name in names for name in decoder):
                raise UsageError(
                    "the graph makes its decoder's inputs from input_ids, the model from labels",
                    next_step="capture again with labels or decoder_input_ids among the examples",
                )
            if decoder[0] in names and arguments.get(decoder[0]) is None:
                arguments[decoder[0]] = self.decoder_inputs(labels)
        for argument in self.arguments:
            if argument.ones_like is None or arguments.get(argument.name) is not None:
                continue
            like = arguments.get(argument.ones_like)
            if like is None:
                continue
            _refuse_packed(argument.name, arguments.get("position_ids"))
            arguments[argument.name] = torch.ones(
                like.shape[:2], dtype=torch.long, device=like.device
            )

    def _expand_rows(self, arguments: dict[str, Any]) -> None:
        """Gives an input of one row (such as `position_ids`) the rows of the others."""
        batched = [
            a for a in self.arguments if a.is_tensor and a.shapes[0] and a.shapes[0][0] == "batch"
        ]
        rows = max([1, *(arguments[a.name].shape[0] for a in batched if arguments[a.name].dim())])
        for argument in batched:
            value = arguments[argument.name]
            if rows > 1 and value.dim() and value.shape[0] == 1 and not value.is_floating_point():
                arguments[argument.name] = value.expand(rows, *value.shape[1:])

    def _check_sizes(
        self,
        name: str,
        value: Any,
        shape: tuple[int | str | None, ...],
        sizes: dict[str, tuple[int, str]],
    ) -> None:
        if not isinstance(value, torch.Tensor):
            return
        if value.dim() != len(shape):
            raise InputRefusedError(
                f"{name} has {value.dim()} dimensions",
                expected=_shown(shape),
                found=list(value.shape),
            )
        for axis, (size, allowed) in enumerate(zip(value.shape, shape, strict=True)):
            if allowed is None:
                continue
            if isinstance(allowed, int):
                if size != allowed:
                    raise InputRefusedError(
                        f"dimension {axis} of {name} is fixed at {allowed} in this graph",
                        expected=_shown(shape),
                        found=list(value.shape),
                        next_step="capture again with examples of that size or dynamic_shapes",
                    )
                continue
            limit = self.largest.get(allowed)
            if limit is not None and size > limit:
                raise InputRefusedError(
                    f"dimension {axis} of {name} is {size}, and the model takes at most {limit}",
                    expected=f"{allowed} <= {limit}",
                    found=list(value.shape),
                    next_step="shorten the input; the model has no positions beyond that",
                )
            if size < self.smallest.get(allowed, 0):
                raise InputRefusedError(
                    f"dimension {axis} of {name} is {size}, and the graph was traced for more",
                    expected=f"{allowed} >= {self.smallest[allowed]}",
                    found=list(value.shape),
                    next_step="capture again with a smaller minimum, or pad the input",
                )
            before = sizes.setdefault(allowed, (size, name))
            if before[0] != size:
                raise InputRefusedError(
                    f"{name} and {before[1]} disagree about the size called {allowed}",
                    expected=f"{before[0]}, as in {before[1]}",
                    found=f"{name} of shape {list(value.shape)}",
                )


def _shown(shape: tuple[int | str | None, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"


def _refuse_packed(mask: str, position_ids: Any) -> None:
    """Refuses positions that transformers would read as packed sequences, and a mask not."""
    if (
        not isinstance(position_ids, torch.Tensor)
        or position_ids.dim() != 2
        or position_ids.shape[1] < 2
    ):
        return
    follow = (position_ids.diff(dim=-1) == 1).all()
    problem = f"position_ids restart within a row and there is no {mask}"
    advice = (
        "pass use_cache=False, as transformers packs without a cache alone; where you chose the "
        f"example inputs, position_ids and {mask}=None among them"
    )
    if torch.compiler.is_compiling():  # where a branch on data would break the graph
        torch._assert_async(follow, f"{problem}: {advice}")
    elif not follow:
        raise InputRefusedError(
            problem,
            expected=f"a {mask} that separates the packed sequences, or one sequence a row",
            next_step=advice,
        )
