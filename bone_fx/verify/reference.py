"""The torch side of verification: the base, under its unmerged adapters, and with them folded.

The reference is the model as transformers runs it, with the adapters, as
`verify.unmerged.peft_layout` read them, applied by hooks on its layers
(`verify.unmerged.layer_forward`): no graph, recipe, operator or translation of ours stands in it.
Only its folded twin uses our own fold, `passes.fold`, and is compared with the unmerged one.

A key of an adapter's blocks is the name of a layer, whose weight is adapted, or of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bone_fx.adapters import Block, LowRank
from bone_fx.errors import VerificationError
from bone_fx.passes.fold import fold_weight
from bone_fx.verify.fold_bounds import fold_bounds
from bone_fx.verify.unmerged.layer_forward import layer_forward, table_forward, updated_weight
from bone_fx.verify.unmerged.peft_layout import PeftAdapter
from bone_fx.weights.streamed import change, replacement

Adapters = Sequence[PeftAdapter]
Steps = Sequence[tuple[str, Block]]


def load_parameters(model: nn.Module, adapters: Adapters) -> None:
    """Give a model the parameters that adapters trained whole; a tied one no longer follows.

    Raises:
        VerificationError: The model has no such parameter, or one of another shape.
    """
    for adapter in adapters:
        for name, tensor in adapter.parameters.items():
            owner, _, attribute = name.rpartition(".")
            before = stored(model, name)
            if before is None or before.shape != tensor.shape:
                raise VerificationError(
                    f"verification failed: {name} of the adapter {adapter.folder.name} is no"
                    " parameter of the model",
                    expected="none" if before is None else list(before.shape),
                    found=list(tensor.shape),
                    next_step="check that the adapter is this base's",
                )
            new: Tensor = tensor.clone()
            if isinstance(before, nn.Parameter):
                new = replacement(before, new, tensor.clone)
            setattr(model.get_submodule(owner), attribute, new)
        for layer, (numbers, values) in adapter.rows.items():
            table = model.get_submodule(layer).get_parameter("weight")
            change(table, partial(_with_rows, numbers=numbers, values=values))  # a tied one follows


def _with_rows(table: Tensor, numbers: Sequence[int], values: Tensor) -> Tensor:
    return table.index_copy(0, torch.tensor(numbers), values.to(table.dtype))


@contextmanager
def unmerged(model: nn.Module, adapters: Adapters) -> Iterator[None]:
    """A context in which a model's layers run under their adapters, not folded."""
    handles = []
    for name in adapted_layers(adapters):
        steps = steps_of(name, adapters)
        if stored(model, name) is not None:
            handles += _parameter_hooks(model, name, steps)
            continue
        biases = [a.biases[name] for a in adapters if name in a.biases]
        layer = model.get_submodule(name)
        handles.append(layer.register_forward_hook(_hook(name, steps, biases)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fold_in_place(model: nn.Module, adapters: Adapters) -> None:
    """Fold the adapters into a model's weights, in place; into a streamed one as it is read."""
    for layer in adapted_layers(adapters):
        change(_weight(model, layer), _fold_of(model, layer, adapters))
    for adapter in adapters:
        for layer, added in adapter.biases.items():
            change(model.get_submodule(layer).get_parameter("bias"), added.add)


def folded_bounds(model: nn.Module, name: str, adapters: Adapters) -> tuple[Tensor, Tensor]:
    """Between which values a parameter lies with the adapters folded in, as the model keeps it.

    One tensor twice where there is nothing to round.
    """
    value = stored(model, name)
    assert value is not None
    value = value.detach()
    layer, _, attribute = name.rpartition(".")
    for adapter in adapters:
        if attribute == "weight" and (table := _table_of(model, name, adapter)) is not None:
            value = _with_rows(value, *adapter.rows[table])
        if attribute == "bias" and layer in adapter.biases:
            value = value + adapter.biases[layer]
    key = name if steps_of(name, adapters) else layer if attribute == "weight" else ""
    steps = _methods(model, key, adapters)
    if not steps:
        return value, value
    if value.dim() == 3:
        each = [
            fold_bounds(matrix, _of_expert(steps, number), transposed=False, layer=key)
            for number, matrix in enumerate(value)
        ]
        return torch.stack([low for low, _ in each]), torch.stack([high for _, high in each])
    return fold_bounds(value, steps, transposed=_is_transposed(model, key), layer=key)


def _table_of(model: nn.Module, name: str, adapter: PeftAdapter) -> str | None:
    """The layer whose rows an adapter replaces, if a parameter is its table or tied to it."""
    value = stored(model, name)
    return next((t for t in adapter.rows if stored(model, f"{t}.weight") is value), None)


def _fold_of(model: nn.Module, layer: str, adapters: Adapters) -> Callable[[Tensor], Tensor]:
    """What folds the adapters into a layer's weight: a function from the weight to the folded."""
    methods = _methods(model, layer, adapters)
    if _weight(model, layer).dim() == 3:
        return partial(_fold_experts, steps=methods, layer=layer)
    transposed = _is_transposed(model, layer)
    return partial(fold_weight, steps=methods, transposed=transposed, layer=layer)


def _methods(model: nn.Module, layer: str, adapters: Adapters) -> list[tuple[str, Block]]:
    """The method of our fold and the block of each adapter of a layer."""
    steps = steps_of(layer, adapters)
    if not steps:
        return []
    outputs = _weight(model, layer).shape[1 if _is_transposed(model, layer) else 0]
    return [
        ("mini" if kind == "bone" and _is_narrow(block, outputs) else kind, block)
        for kind, block in steps
    ]


def _is_narrow(block: Block, out_features: int) -> bool:
    return isinstance(block, Tensor) and block.shape[1] != out_features


def _fold_experts(weights: Tensor, steps: Steps, layer: str) -> Tensor:
    each = enumerate(weights)
    return torch.stack([fold_weight(w, _of_expert(steps, n), layer=layer) for n, w in each])


def _of_expert(steps: Steps, number: int) -> list[tuple[str, Block]]:
    return [(kind, block.expert(number)) for kind, block in steps if isinstance(block, LowRank)]


def adapted_layers(adapters: Adapters) -> list[str]:
    """Names of the layers and parameters that one of the adapters has a block for."""
    return list(dict.fromkeys(layer for adapter in adapters for layer in adapter.blocks))


def steps_of(layer: str, adapters: Adapters) -> list[tuple[str, Block]]:
    """Kind and block of each adapter of a layer, in the order in which they apply."""
    return [(a.kind, a.blocks[layer]) for a in adapters if layer in a.blocks]


def weight_name(model: nn.Module, layer: str) -> str:
    """The parameter that a key of an adapter's blocks stands for."""
    return f"{layer}.weight" if stored(model, layer) is None else layer


def _weight(model: nn.Module, layer: str) -> Tensor:
    weight = stored(model, weight_name(model, layer))
    assert weight is not None
    return weight


def stored(model: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer by its name; None if a model has none."""
    owner, _, attribute = name.rpartition(".")
    try:
        value = getattr(model.get_submodule(owner), attribute)
    except AttributeError:
        return None
    return value if isinstance(value, Tensor) else None


def _is_transposed(model: nn.Module, layer: str) -> bool:
    """Whether a layer keeps its weight `[I, O]`, as Conv1D and tables of embeddings do."""
    if stored(model, layer) is not None:
        return False
    return not isinstance(model.get_submodule(layer), nn.Linear)


def _hook(layer: str, steps: Steps, biases: Sequence[Tensor]) -> Any:
    def run(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weight = module.get_parameter("weight")
        if isinstance(module, nn.Embedding):
            result = table_forward(module, args[0], output, steps)
        else:
            bias: Tensor | None = getattr(module, "bias", None)
            w_OI = weight if isinstance(module, nn.Linear) else weight.t()
            result = layer_forward(args[0], w_OI, bias, steps)
        for added in biases:
            result = result + added
        if result.shape != output.shape:
            raise VerificationError(
                f"verification failed: {layer}: the adapter's block does not fit the layer",
                expected=list(output.shape),
                found=list(result.shape),
                next_step="use the base model that the adapter was trained on",
            )
        return result

    return run


def _parameter_hooks(model: nn.Module, name: str, steps: Steps) -> list[Any]:
    """Hooks that put a parameter under its adapters while its module runs, as PEFT does."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    before: list[nn.Parameter] = []

    def put(module: nn.Module, _args: object) -> None:
        parameter = module.get_parameter(attribute)
        before.append(parameter)
        setattr(module, attribute, nn.Parameter(updated_weight(parameter, steps), False))

    def restore(module: nn.Module, _args: object, _output: object) -> None:
        setattr(module, attribute, before.pop())

    return [module.register_forward_pre_hook(put), module.register_forward_hook(restore)]
