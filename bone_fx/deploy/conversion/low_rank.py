"""Blocks as LoRAs: exact where the method adds a block, else the nearest of a rank.

Shapes: I in_features, O out_features, R block size or rank, Q rank and what is sampled beyond it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bone_fx.adapters import METHODS, Block, LowRank
from bone_fx.sites import LinearSite

_OVERSAMPLED, _ITERATIONS = 16, 8
"""Of the randomized decomposition."""


def exact(d_RO: Tensor, in_features: int) -> LowRank:
    """The LoRA that a Bone block is: A has a one where input i meets row i mod R."""
    rank = d_RO.shape[0]
    a_RI = torch.eye(rank).repeat(1, -(-in_features // rank))[:, :in_features]
    return LowRank(a_RI.contiguous(), d_RO.t().contiguous(), 1.0)


def nearest(delta_OI: Tensor, rank: int) -> LowRank:
    """The LoRA of a rank that is nearest to a change, by its largest singular values."""
    rank = min(rank, *delta_OI.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = min(rank + _OVERSAMPLED, *delta_OI.shape)
        u_OQ, s_Q, v_IQ = torch.svd_lowrank(delta_OI, width, _ITERATIONS)
    roots_R = s_Q[:rank].sqrt()
    a_RI = (v_IQ[:, :rank] * roots_R).t().contiguous()
    return LowRank(a_RI, (u_OQ[:, :rank] * roots_R).contiguous(), 1.0)


def delta(method: str, site: LinearSite, block: Block) -> Tensor:
    """What an additive method adds to a layer's weight, `[O, I]`."""
    return METHODS[method].delta(torch.zeros(site.out_features, site.in_features), block)
