"""The torch side of verification: the base, under its unmerged adapters, and with them folded.

The reference is the model as transformers runs it, with the adapters, as `verify.peft_layout` read
them, applied by hooks on its layers: no graph, recipe, operator or translation of ours stands in
it. Only its folded twin uses our own fold, `passes.fold`, and is compared with the unmerged one.

Shape letters: T tokens, I in_features, O out_features, R block size, M width of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bone_fx.errors import VerificationError
from bone_fx.passes.fold import fold_weight
from bone_fx.verify.peft_layout import BAT, PeftAdapter
from bone_fx.weights.streamed import change, replacement

Adapters = Sequence[PeftAdapter]
Steps = Sequence[tuple[str, Tensor]]


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


@contextmanager
def unmerged(model: nn.Module, adapters: Adapters) -> Iterator[None]:
    """A context in which a model's layers run under their adapters, not folded."""
    handles = [
        model.get_submodule(layer).register_forward_hook(_hook(layer, steps_of(layer, adapters)))
        for layer in adapted_layers(adapters)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fold_in_place(model: nn.Module, adapters: Adapters) -> None:
    """Fold the adapters into a model's weights, in place; into a streamed one as it is read."""
    for layer in adapted_layers(adapters):
        weight = model.get_submodule(layer).get_parameter("weight")
        change(weight, _fold_of(model, layer, adapters))


def folded_weight(model: nn.Module, layer: str, adapters: Adapters) -> Tensor:
    """A layer's weight with the adapters folded in, as the model keeps it: the eager fold."""
    weight = model.get_submodule(layer).get_parameter("weight").detach()
    return _fold_of(model, layer, adapters)(weight)


def _fold_of(model: nn.Module, layer: str, adapters: Adapters) -> Callable[[Tensor], Tensor]:
    """What folds the adapters into a layer's weight: a function from the weight to the folded."""
    module = model.get_submodule(layer)
    transposed = _is_transposed(module)
    out_features = module.get_parameter("weight").shape[1 if transposed else 0]
    methods = [
        (kind if kind == BAT or block.shape[1] == out_features else "mini", block)
        for kind, block in steps_of(layer, adapters)
    ]
    return partial(fold_weight, steps=methods, transposed=transposed, layer=layer)


def adapted_layers(adapters: Adapters) -> list[str]:
    """Names of the layers that one of the adapters has a block for."""
    return list(dict.fromkeys(layer for adapter in adapters for layer in adapter.blocks))


def steps_of(layer: str, adapters: Adapters) -> list[tuple[str, Tensor]]:
    """Kind and block of each adapter of a layer, in the order in which they apply."""
    return [(a.kind, a.blocks[layer]) for a in adapters if layer in a.blocks]


def stored(model: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer by its name; None if a model has none."""
    owner, _, attribute = name.rpartition(".")
    try:
        value = getattr(model.get_submodule(owner), attribute)
    except AttributeError:
        return None
    return value if isinstance(value, Tensor) else None


def _is_transposed(module: nn.Module) -> bool:
    """Whether a layer keeps its weight `[I, O]`, as transformers' Conv1D does."""
    return not isinstance(module, nn.Linear)


def _hook(layer: str, steps: Steps) -> Any:
    def run(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weight = module.get_parameter("weight")
        bias: Tensor | None = getattr(module, "bias", None)
        result = _forward(args[0], weight.t() if _is_transposed(module) else weight, bias, steps)
        if result.shape != output.shape:
            raise VerificationError(
                f"verification failed: {layer}: the adapter's block does not fit the layer",
                expected=list(output.shape),
                found=list(result.shape),
                next_step="use the base model that the adapter was trained on",
            )
        return result

    return run


def _forward(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, steps: Steps) -> Tensor:
    """A layer under its adapters: products with the input for Bone, with the weight for BAT."""
    last_bat = max((i for i, (kind, _) in enumerate(steps) if kind == BAT), default=-1)
    for kind, block in steps[: last_bat + 1]:
        delta = _bat_delta(weight_OI, block) if kind == BAT else _tiled(weight_OI, block)
        weight_OI = weight_OI + delta
    result = nn.functional.linear(x_TI, weight_OI, bias_O)
    for _, block_RM in steps[last_bat + 1 :]:
        rank, width = block_RM.shape
        padded = nn.functional.pad(x_TI, (0, -x_TI.shape[-1] % rank))
        product_TM = padded.view(*padded.shape[:-1], -1, rank).sum(-2) @ block_RM
        result = result + torch.cat([product_TM] * (result.shape[-1] // width), -1)
    return result


def _tiled(weight_OI: Tensor, block_RM: Tensor) -> Tensor:
    """What Bone adds to a weight: the block, transposed, side by side along I."""
    rows, columns = weight_OI.shape
    rank, width = block_RM.shape
    return block_RM.t().repeat(rows // width, -(-columns // rank))[:, :columns]


def _bat_delta(weight_OI: Tensor, block_ORR: Tensor) -> Tensor:
    """What BAT adds to a weight: each R x R tile's product with its row's block, and that block."""
    rank = block_ORR.shape[-1]
    rows, columns = weight_OI.shape
    tiles = weight_OI.reshape(rows // rank, rank, columns // rank, rank)
    delta = torch.einsum("orik,okj->orij", tiles, block_ORR) + block_ORR[:, :, None, :]
    return delta.reshape(rows, columns)
