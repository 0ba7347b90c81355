"""A layer under its adapters, not folded: what PEFT's own layers compute.

What is only added is a product with the input; what acts on the weight (BAT, DoRA) is applied to
the weight, or for the last DoRA to the product's outputs, as PEFT does.

Shape letters: T tokens, I in_features, O out_features, R block size, M width of a block, E experts,
V rows of a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bone_fx.adapters import Block, LowRank
from bone_fx.verify.unmerged.peft_layout import BAT, DORA

Steps = Sequence[tuple[str, Block]]


def layer_forward(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, steps: Steps) -> Tensor:
    """A linear layer's outputs `[..., O]`."""
    last = max((i for i, (kind, _) in enumerate(steps) if kind in (BAT, DORA)), default=-1)
    of_weight, added = steps[: last + 1], steps[last + 1 :]
    dora = of_weight[-1][1] if of_weight and of_weight[-1][0] == DORA else None
    weight_OI = updated_weight(weight_OI, of_weight[:-1] if dora is not None else of_weight)
    result = nn.functional.linear(x_TI, weight_OI)
    if isinstance(dora, LowRank):
        product = _product(x_TI, dora)
        result = _lengths(weight_OI, dora) * (result + product)
    for _, block in added:
        if isinstance(block, LowRank):
            result = result + _product(x_TI, block)
            continue
        rank, width = block.shape
        padded = nn.functional.pad(x_TI, (0, -x_TI.shape[-1] % rank))
        product_TM = padded.view(*padded.shape[:-1], -1, rank).sum(-2) @ block
        result = result + torch.cat([product_TM] * (result.shape[-1] // width), -1)
    return result if bias_O is None else result + bias_O


def table_forward(module: nn.Embedding, ids: Tensor, output: Tensor, steps: Steps) -> Tensor:
    """Embeddings `[..., D]` of a table under LoRAs, given those of the base."""
    scale = getattr(module, "embed_scale", 1.0)  # of the models that scale their embeddings
    weight_OI = module.weight.t()
    for kind, block in steps:
        assert isinstance(block, LowRank)
        found = nn.functional.embedding(ids, block.a.t()) @ block.b.t()
        output = output + scale * block.scale * found
        if kind == DORA:
            output = _lengths(weight_OI, block) * output
        if len(steps) > 1:
            weight_OI = updated_weight(weight_OI, [(kind, block)])
    return output


def updated_weight(weight: Tensor, steps: Steps) -> Tensor:
    """A weight `[O, I]`, or `[E, O, I]` stacked, under its adapters."""
    for kind, block in steps:
        if isinstance(block, LowRank):
            factor = _lengths(weight, block).unsqueeze(1) if kind == DORA else 1.0
            weight = factor * (weight + block.scale * (block.b @ block.a))
        else:
            weight = weight + (_bat_delta if kind == BAT else _tiled)(weight, block)
    return weight


def _product(x_TI: Tensor, block: LowRank) -> Tensor:
    """What a LoRA adds to a layer's outputs."""
    return block.scale * nn.functional.linear(nn.functional.linear(x_TI, block.a), block.b)


def _lengths(weight_OI: Tensor, block: LowRank) -> Tensor:
    """DoRA's factor of each output: the length that was trained by the one that it has."""
    assert block.magnitude is not None
    length_O: Tensor = torch.linalg.norm(weight_OI + block.scale * (block.b @ block.a), dim=1)
    return block.magnitude / length_O


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
