"""Places for biases that a LoRA brings and the base's layers lack, in a checkpoint of its class.

Some classes have a field for them (`attention_bias`, `mlp_bias`), which gives several layers a bias
at once: the others' are zeros.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from bone_fx.deploy.checkpoint_inputs import CheckpointInputs


def with_places_for_biases(inputs: CheckpointInputs) -> CheckpointInputs:
    """Inputs whose configuration has the biases that its adapters bring, if a field gives them."""
    from bone_fx.base.architectures import with_overrides
    from bone_fx.base.skeleton import meta_model

    def shapes(**fields: bool) -> dict[str, torch.Size]:
        config = with_overrides(inputs.config, fields)
        model = meta_model(config, torch.float32, inputs.architecture)
        return {name: parameter.shape for name, parameter in model.named_parameters()}

    if not inputs.new_biases:
        return inputs
    config, before = inputs.config, shapes()
    off = [name for name, value in config.to_dict().items() if value is False and "bias" in name]
    fields: dict[str, bool] = {}
    for name in off:
        added = shapes(**{name: True}).keys() - before.keys()
        if added & inputs.new_biases and all(each.endswith(".bias") for each in added):
            fields[name] = True
    added_shapes = {n: s for n, s in shapes(**fields).items() if n not in before}
    if not inputs.new_biases <= added_shapes.keys():
        return inputs
    zeros = {name: torch.zeros(shape) for name, shape in added_shapes.items()}
    note = f"lora_bias: {', '.join(fields)} in config.json gives layers a bias, others one of zeros"
    return replace(
        inputs,
        overrides={**inputs.overrides, **fields},
        heads={**inputs.heads, **zeros},
        new_biases=frozenset(),
        notes=(*inputs.notes, note),
    )
