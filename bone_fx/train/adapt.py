"""`adapt`: capture a model, insert an adapter, give back a module to train."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from bone_fx.adapter_folder import read_trained
from bone_fx.base.hub import adapter_folder
from bone_fx.config import BoneConfig
from bone_fx.errors import UsageError
from bone_fx.progress import Progress
from bone_fx.train.adapted_module import AdaptedModule
from bone_fx.train.origin import capture_origin, check_model


def adapt(
    model: nn.Module,
    config: BoneConfig | str | Path | Any,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    adapter_name: str = "default",
    *,
    is_trainable: bool = True,
    untie: bool = False,
    freeze_base: bool = True,
    gradient_checkpointing: bool = False,
    recompute: bool = True,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    progress: Progress | bool = True,
) -> AdaptedModule:
    """Capture a model for training and put an adapter on it.

    Args:
        model: A transformers model or any module that `torch.export` takes; it is left as it was,
            and its weights are shared, not copied.
        config: A `BoneConfig` for a fresh adapter (PEFT's own is taken too), or the folder of a
            trained one in PEFT's layout.
        example_inputs: One call's arguments, by name or position. Their values do not matter;
            `labels` are passed over. None makes those of a transformers model up.
        adapter_name: The adapter's name.
        is_trainable: Whether a trained adapter goes on training. False freezes it and switches to
            evaluation, as `AdaptedModule.from_pretrained` and PEFT do by default.
        untie: Allow a layer whose weight is tied to another as a target; it gets a weight of its
            own.
        freeze_base: Freeze every parameter but the blocks and `modules_to_save`.
        gradient_checkpointing: Recompute each layer's activations in backward instead of keeping
            them.
        recompute: Fold BAT's weights again in backward. False keeps them from the forward: faster,
            and one float32 weight a layer more memory.
        dynamic_shapes: `torch.export`'s own, instead of a dynamic batch and length.
        progress: Tell the stages on stderr, for a model of 20 MB or more; or what is to be told
            instead, an object with `stage(name)` and `advance(done, total)`.

    Returns:
        The module in the mode (`train` or `eval`) of the model, the adapter active, its blocks
        trainable unless `config.inference_mode`, called like the model; given `labels` its output
        has the model's own `.loss`.

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
    check_model(model)
    folder = None
    if isinstance(config, str | Path):
        # A broken folder is refused before the trace.
        folder = read_trained(adapter_folder(config), adapter_name)
        config = replace(folder.config, inference_mode=not is_trainable)
    config = BoneConfig.of(config)
    training = model.training and is_trainable
    origin = capture_origin(
        model,
        example_inputs,
        dynamic_shapes=dynamic_shapes,
        untie=untie,
        freeze_base=freeze_base,
        recompute=recompute,
        progress=progress,
    )
    origin.progress.stage("insert the adapter")
    adapted = AdaptedModule(origin)._start(adapter_name, config, folder)
    if gradient_checkpointing:
        adapted.gradient_checkpointing_enable()
    return adapted.train(training)


def get_peft_model(
    model: nn.Module,
    peft_config: BoneConfig | Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    **options: Any,
) -> AdaptedModule:
    """PEFT's name for `adapt`, with its arguments in its order.

    Args:
        model: The base model; it is left as it was.
        peft_config: A `BoneConfig`, or PEFT's own `BoneConfig` or `MissConfig`.
        adapter_name: The adapter's name.
        mixed: Must be False; adapters of both kinds live together anyhow.
        autocast_adapter_dtype: False keeps the blocks in the dtype of their layers, not float32.
        revision: Of the base, noted in the configuration.
        low_cpu_mem_usage: Taken as PEFT takes it; blocks are small.
        example_inputs: One call's arguments; None makes those of a transformers model up.
        **options: Those of `adapt`.

    Raises:
        BoneFxError: As `adapt` raises it.

    Examples:
        >>> import bone_fx, torch
        >>> net = nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 7))
        >>> config = bone_fx.BoneConfig(r=16, target_modules=["0"])
        >>> adapted = bone_fx.get_peft_model(net, config, example_inputs=[torch.randn(3, 48)])
        >>> adapted.print_trainable_parameters()
        trainable params: 1,280 || all params: 5,767 || trainable%: 22.1952
    """
    if mixed:
        raise UsageError(
            "mixed=True is for tuners of several kinds",
            next_step="leave it out: Bone, BAT and MiSS adapters live in one module anyhow",
        )
    config = BoneConfig.of(peft_config)
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    noted = config.base_model_name_or_path or None
    if noted is not None and noted != name:
        warnings.warn(
            f"the configuration names the base {noted}, and the model comes from {name}: "
            "the saved adapter will name the latter",
            stacklevel=2,
        )
    revision = revision or config.revision
    config = replace(config, base_model_name_or_path=name, revision=revision)
    adapted = adapt(model, config, example_inputs, adapter_name, **options)
    if not autocast_adapter_dtype:
        adapted._narrow(adapter_name)
    return adapted
