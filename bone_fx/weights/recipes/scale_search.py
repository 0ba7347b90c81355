"""Scales of a row's groups chosen together, for the smallest expected error of the product.

Errors of a row's groups add up in its output, so a group whose rounding leans one way is mended by
another that leans the other way. Groups are visited in turn. Each takes, of a grid of scales around
the one that is best for it alone, the scale (and sign, or zero point) with the smallest expected
error of the whole row, given what the other groups have. Codes stay those nearest to the weight, as
anybody can check who has the weight and no text; feeding errors back into the weights that are not
rounded yet (GPTQ, arXiv 2210.17323) moves codes away from it, and on a text of a thousand tokens
it gains no more.

Shape letters: N outputs, G groups of a row, B values of a group, C candidates, R factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bone_fx.weights.recipes.nbits import QuantizedGroups, Scheme, encode, nearest_codes, quantize
from bone_fx.weights.recipes.second_moments import SecondMoments

SWEEPS = 2
_RATIOS = (1.0, *(1.0 + 0.04 * step for step in (-4, -3, -2, -1, 1, 2, 3, 4)))
_SHIFTS = (0, -1, 1)
_CHUNK = 1 << 18  # values of candidates at a time


def quantize_together(weight_NK: Tensor, scheme: Scheme, moments: SecondMoments) -> QuantizedGroups:
    """Quantize a weight for inputs of known second moments, rows at a time.

    Args:
        weight_NK: The weight, float32 `[N, K]`, K a multiple of the block size.
        scheme: How.
        moments: Of the K inputs.
    """
    size = scheme.block_size
    alone = quantize(weight_NK, scheme, moments.squares)
    weight_NGB = weight_NK.float().reshape(len(weight_NK), -1, size)
    factors_GBR = torch.stack(torch.split(moments.factors, size))
    rest_K = (moments.squares - moments.factors.square().sum(1)).clamp(min=0)
    costs_GBB = factors_GBR @ factors_GBR.mT + torch.diag_embed(rest_K.view(-1, size))
    rows = max(1, _CHUNK // (len(_RATIOS) * len(_SHIFTS) * size))
    parts = [
        _chosen(weight_NGB[part], alone.rows(part), scheme, factors_GBR, costs_GBB)
        for part in (slice(first, first + rows) for first in range(0, len(weight_NK), rows))
    ]
    return QuantizedGroups.joined(parts)


def _chosen(
    weight_NGB: Tensor, start: QuantizedGroups, scheme: Scheme, factors_GBR: Tensor, costs: Tensor
) -> QuantizedGroups:
    scales_NG, zeros_NG = start.scales.float(), start.zeros.float()
    error_NGB = start.values().view_as(weight_NGB) - weight_NGB
    seen_NR = torch.einsum("ngb,gbr->nr", error_NGB, factors_GBR)
    for group in [*range(weight_NGB.shape[1])] * SWEEPS:
        factors_BR, weight_NB = factors_GBR[group], weight_NGB[:, group]
        others_NR = seen_NR - error_NGB[:, group] @ factors_BR
        scales_NC, zeros_NC = _candidates(scales_NG[:, group], zeros_NG[:, group], scheme)
        codes_NCB = nearest_codes(weight_NB.unsqueeze(1), scales_NC, zeros_NC, scheme)
        shifted_NCB = codes_NCB.sub_(zeros_NC.unsqueeze(-1))
        error_NCB = shifted_NCB.mul_(scales_NC.unsqueeze(-1)).sub_(weight_NB.unsqueeze(1))
        leaning_NB = 2 * (others_NR @ factors_BR.t())
        cost_NC = ((error_NCB @ costs[group] + leaning_NB.unsqueeze(1)) * error_NCB).sum(-1)
        best_N1 = cost_NC.argmin(1, keepdim=True)
        scales_NG[:, group] = scales_NC.gather(1, best_N1).squeeze(1)
        zeros_NG[:, group] = zeros_NC.gather(1, best_N1).squeeze(1)
        places = best_N1.unsqueeze(-1).expand(-1, 1, weight_NB.shape[1])
        error_NGB[:, group] = error_NCB.gather(1, places).squeeze(1)
        seen_NR = others_NR + error_NGB[:, group] @ factors_BR
    return encode(weight_NGB, scales_NG, zeros_NG, scheme)


def _candidates(scales_N: Tensor, zeros_N: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scales and zero points `[N, C]` to try in place of one; the first is the one itself."""
    ratios = torch.tensor(_RATIOS)
    if scheme.symmetric:  # of two signs, since there is one more code on one side of the middle
        ratios_C, shifts_C = torch.cat((ratios, -ratios)), torch.zeros(2 * len(ratios))
    else:
        ratios_C = ratios.repeat(len(_SHIFTS))
        shifts_C = torch.tensor(_SHIFTS).repeat_interleave(len(ratios))
    scales_NC = (scales_N.unsqueeze(1) * ratios_C).to(scheme.scale_dtype).float()
    return scales_NC, (zeros_N.unsqueeze(1) + shifts_C).clamp(0, scheme.levels)
