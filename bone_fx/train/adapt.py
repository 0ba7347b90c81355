"""`adapt`: capture a model, insert an adapter, give back a module to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bone_fx.adapter_folder import read_adapter
from bone_fx.capture.training.capture_training import capture_training
from bone_fx.config import BoneConfig
from bone_fx.train.adapted_module import AdaptedModule
from bone_fx.train.mounting import Origin


def adapt(
    model: nn.Module,
    config: BoneConfig | str | Path,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    adapter_name: str = "default",
    *,
    untie: bool = False,
    freeze_base: bool = True,
    gradient_checkpointing: bool = False,
    recompute: bool = True,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
) -> AdaptedModule:
    """Capture a model for training and put an adapter on it.

    Args:
        model: A transformers model or any module that `torch.export` takes; it is left as it was,
            and its weights are shared, not copied.
        config: A `BoneConfig` for a fresh adapter, or the folder of a trained one in PEFT's layout.
        example_inputs: One call's arguments, by name or position. Their values do not matter;
            `labels` are passed over.
        adapter_name: The adapter's name.
        untie: Allow a layer whose weight is tied to another as a target; it gets a weight of its
            own.
        freeze_base: Freeze every parameter but the blocks and `modules_to_save`.
        gradient_checkpointing: Recompute each layer's activations in backward instead of keeping
            them.
        recompute: Fold BAT's weights again in backward. False keeps them from the forward: faster,
            and one float32 weight a layer more memory.
        dynamic_shapes: `torch.export`'s own, instead of a dynamic batch and length.

    Returns:
        The module in the mode (`train` or `eval`) of the model, the adapter active, its blocks
        trainable, called like the model; given `labels` its output has the model's own `.loss`.

    Raises:
        CaptureError: The model cannot be captured, or its capture would not be the model.
        ConfigError: A field of the configuration is not allowed.
        SiteError: The targets match nothing, a block cannot fit a layer, or a target is tied.
        AdapterError: The folder is broken or does not fit this model.

    Examples:
        >>> import bone_fx, torch
        >>> net = nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 7))
        >>> config = bone_fx.BoneConfig(r=16, target_modules=["0"])
        >>> adapted = bone_fx.adapt(net, config, [torch.randn(3, 48)]).train()
        >>> adapted(torch.randn(5, 48)).sum().backward()
        >>> [name for name, p in adapted.named_parameters() if p.grad is not None]
        ['0.bone_block.default']
    """
    folder = None
    if not isinstance(config, BoneConfig):
        folder = read_adapter(config, adapter_name)  # a broken one is refused before the trace
        config = folder.config
    training = model.training
    capture = capture_training(model, example_inputs, dynamic_shapes=dynamic_shapes)
    origin = Origin(
        graph_module=capture.graph_module,
        signature=capture.signature,
        model=model,
        loss=capture.loss,
        untie=untie,
        freeze_base=freeze_base,
        recompute=recompute,
    )
    adapted = AdaptedModule(origin)
    adapted._mount(adapter_name, config, folder)
    adapted.set_adapter(adapter_name)
    if gradient_checkpointing:
        adapted.gradient_checkpointing_enable()
    return adapted.train(training)
