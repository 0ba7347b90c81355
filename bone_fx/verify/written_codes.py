"""Codes as they were written, held to the parameter that they were made from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bone_fx.errors import LOOK, VerificationError
from bone_fx.weights.recipes.nbits import QuantizedGroups

LARGEST_ERROR = {4: 0.25, 8: 0.02}
"""Norm of a weight's rounding error by bits, relative to the weight's norm."""

_NEAREST = 0.51  # of a step; a half, and what float32 leaves open


def parameter_of(model: nn.Module, codes: str, *, gathered: bool) -> tuple[nn.Module, str, Tensor]:
    """The module, the attribute and the tensor that codes were made from.

    Of the names of a tied weight: an embedding's if rows are gathered, else another's.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    name = max((n for n in parameters if codes.startswith(f"{n}.")), key=len, default=None)
    if name is None:
        raise VerificationError(
            f"verification failed: {codes}: the model has no such weight",
            next_step=LOOK,
        )
    weight = parameters[name]
    aliases = [n for n, p in parameters.items() if p is weight]
    fitting = [
        n
        for n in aliases
        if isinstance(model.get_submodule(n.rpartition(".")[0]), nn.Embedding) == gathered
    ]
    chosen = name if name in fitting or not fitting else fitting[0]
    owner, _, attribute = chosen.rpartition(".")
    return model.get_submodule(owner), attribute, weight


def what_differs(weight: Tensor, values: Tensor, groups: QuantizedGroups, bits: int) -> str:
    """Why codes are not a weight rounded to nearest; empty if they are."""
    error = float((values - weight).norm() / weight.norm().clamp(min=1e-30))
    if error > LARGEST_ERROR[bits]:
        return f"other values: they differ by {error:.2g} of the weight"
    scales = groups.scales.float().unsqueeze(-1)
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    places = weight.view_as(groups.codes) * inverse + groups.zeros.float().unsqueeze(-1)
    off = (places.clamp(0, (1 << bits) - 1) - groups.codes.float()).abs().max()
    return "" if float(off) <= _NEAREST else f"a code that is {float(off):.2f} steps off"
