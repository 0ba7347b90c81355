"""Which tensor of a checkpoint each parameter gets when transformers loads it.

The class's own `from_pretrained` runs on stand-ins: tensors of the true shapes, all of whose values
are the number of their name in the checkpoint, which take no memory. What a parameter then holds
says where its bytes come from, whatever is renamed, tied or missing on the way.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import initialization as init

from bone_fx.base.loading import BaseCheckpoint
from bone_fx.base.real_model import quiet_loading
from bone_fx.weights.recipes.recipe import Read


@dataclass(frozen=True)
class LoadedNames:
    """What transformers makes of the names in a checkpoint.

    Attributes:
        keys: Name in the checkpoint by name in the model; parameters only.
        missing: Names in the model that the checkpoint has nothing for.
        unexpected: Names that the model has no use for, as transformers writes them.
    """

    keys: dict[str, str]
    missing: frozenset[str]
    unexpected: frozenset[str]


def names_as_loaded(
    base: BaseCheckpoint, architecture: type[PreTrainedModel], skipped: Collection[str] = ()
) -> LoadedNames:
    """Load a checkpoint's names with transformers.

    Args:
        base: The checkpoint.
        architecture: The class to load.
        skipped: Names in the checkpoint to leave out: converting them would need their memory.
    """
    names = [key for key in base.tensors if key not in skipped]
    stand_ins = {key: _stand_in(base.tensors[key], place) for place, key in enumerate(names)}
    with quiet_loading(), init.no_init_weights():
        model, report = cast(Any, architecture).from_pretrained(
            None,
            config=base.config,
            state_dict=stand_ins,
            dtype=torch.float32,
            output_loading_info=True,
        )
    parameters = model.named_parameters(remove_duplicate=False)
    missing = frozenset(map(str, report["missing_keys"]))
    return LoadedNames(
        {name: names[int(p.flatten()[0])] for name, p in parameters if name not in missing},
        missing,
        frozenset(map(str, report["unexpected_keys"])),
    )


def _stand_in(read: Read, place: int) -> Tensor:
    floats = read.dtype.is_floating_point
    value = torch.full((), float(place)) if floats else torch.zeros((), dtype=read.dtype)
    return value.expand(read.shape)
