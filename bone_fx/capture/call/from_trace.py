"""The call signature of a trace, from the examples and from what the tracer found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from bone_fx.capture.call.conditions import conditions_of
from bone_fx.capture.call.nesting import Nesting
from bone_fx.capture.call.positions import largest_lengths
from bone_fx.capture.call.signature import Argument, CallSignature
from bone_fx.capture.trace.dynamic_axes import fixed_size
from bone_fx.capture.trace.examples import BATCH
from bone_fx.capture.trace.hf_model import LABEL_NAMES, is_transformers_model
from bone_fx.capture.trace.tracing import Trace


def call_of_trace(model: torch.nn.Module, trace: Trace, graph_module: GraphModule) -> CallSignature:
    """How the graph of `trace` is called.

    Args:
        model: The model that was traced.
        trace: The trace.
        graph_module: Its graph with the state mounted (the tables of positions are looked at).
    """
    program, examples = trace.program, trace.examples
    placeholders = iter(graph_module.graph.find_nodes(op="placeholder"))
    names: dict[str, str] = {}
    arguments = []
    for name, value in examples.inputs.items():
        leaves, spec = pytree.tree_flatten(value)
        roles = examples.varying.get(name, {})
        shapes = [_sizes(next(placeholders), name, roles, names) for _ in leaves]
        arguments.append(Argument(name, Nesting(spec), tuple(shapes), examples.ones_like.get(name)))
    arguments = _same_as_masked(arguments)
    smallest, largest = {}, {}
    for symbol, interval in program.range_constraints.items():
        size = names.get(str(symbol))
        if size is not None and interval.lower > 2:  # the tracer assumes two by itself
            smallest[size] = int(interval.lower)
        if size is not None and interval.upper < 2**31:
            largest[size] = int(interval.upper)
    transformers = is_transformers_model(model)
    output_spec = program.call_spec.out_spec
    assert output_spec is not None
    signature = CallSignature(
        arguments=tuple(arguments),
        output=Nesting(output_spec),
        constants=examples.constants,
        positional=examples.positional,
        smallest=smallest,
        largest=largest,
        conditions=conditions_of(program),
        ignored=LABEL_NAMES if transformers else (),
        decoder_inputs=_decoder_inputs(model) if transformers else None,
    )
    tables = largest_lengths(graph_module, signature, _token(model))
    return replace(signature, largest={**signature.largest, **tables})


def _sizes(
    placeholder: Node, name: str, roles: dict[int, str], names: dict[str, str]
) -> tuple[int | str | None, ...]:
    """The sizes that a placeholder takes; `names` maps the tracer's symbols to ours."""
    value = placeholder.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    sizes: list[int | str | None] = []
    for axis, size in enumerate(value.shape):
        fixed = fixed_size(size)
        if fixed is not None:
            sizes.append(fixed)
        elif roles.get(axis) == BATCH:
            sizes.append(names.setdefault(str(size), BATCH))
        elif isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
            sizes.append(
                names.setdefault(str(size), f"{roles.get(axis, f'dimension {axis}')} of {name}")
            )
        else:
            sizes.append(None)
    return tuple(sizes)


def _same_as_masked(arguments: list[Argument]) -> list[Argument]:
    """A mask has the sizes of what it masks, also where the trace did not need them to be equal."""
    by_name = {argument.name: argument for argument in arguments}
    result = []
    for argument in arguments:
        like = by_name.get(argument.ones_like or "")
        shape = argument.shapes[0]
        if like is not None and len(shape) == 2 and all(isinstance(size, str) for size in shape):
            argument = replace(argument, shapes=(like.shapes[0][:2],))
        result.append(argument)
    return result


def _token(model: torch.nn.Module) -> int:
    """A token that is not padding."""
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    return 0 if padding != 0 else 1


class _ConfigOnly:
    """Stands for a model in those of its methods that only read the config."""

    def __init__(self, model_class: type, config: Any) -> None:
        self._model_class = model_class
        self.config = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._model_class, name).__get__(self)

    def __call__(self, labels: torch.Tensor) -> torch.Tensor:
        shifted: torch.Tensor = self.prepare_decoder_input_ids_from_labels(labels=labels)
        return shifted


def _decoder_inputs(model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return None
    return _ConfigOnly(type(model), model.config)
