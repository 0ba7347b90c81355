"""The checkpoint with its weights, as transformers runs it.

The reference that verification compares with. One that has no room in memory is made of weights
that are read as they are used (`base.streamed_model`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import logging as _logging

from bone_fx.base.architectures import reference_attention, with_overrides
from bone_fx.base.left_over import without_adapter
from bone_fx.base.loading import BaseCheckpoint
from bone_fx.errors import BaseModelError
from bone_fx.lora.biases import add_biases

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logging: Any = _logging  # without annotations in transformers

_OF_A_MODEL = ("_from_model_config", "transformers_version")
"""Fields that say where generation settings come from, and set nothing."""
_SHARE = 0.5
"""Part of the available memory that the weights of a reference may take: ONNX Runtime holds the
export's own beside them."""


def room_for(base: BaseCheckpoint, available: int | None) -> int | None:
    """Bytes of weights that a model may keep in memory; None if it has room as a whole.

    Args:
        base: The base model.
        available: Bytes of memory that can be used; None where that is not known.
    """
    whole = sum(4 * math.prod(tensor.shape) for tensor in base.tensors.values())
    if available is None or whole <= _SHARE * available:
        return None
    return int(_SHARE * available)


def load_model(
    base: BaseCheckpoint,
    architecture: type[PreTrainedModel],
    overrides: Mapping[str, Any],
    heads: Mapping[str, Tensor],
    untied: Collection[str] = (),
    room: int | None = None,
) -> PreTrainedModel:
    """The model in float32 and eval mode, with its real weights.

    Args:
        base: The base model.
        architecture: The class to load.
        overrides: Fields of the configuration to set.
        heads: Parameters that the adapters bring, which the model gets too.
        untied: Parameters that get a tensor of their own though the model ties them.
        room: Bytes of weights that may stay in memory, the others are streamed; None for all.

    Raises:
        BaseModelError: A parameter has no bytes, in the base or in `heads`.
    """
    if room is not None:
        from bone_fx.base.streamed_model import streamed_model

        return streamed_model(base, architecture, overrides, heads, untied, room)
    config = with_overrides(base.config, overrides)
    with quiet_loading(), without_adapter(base.folder) as folder:
        model, report = cast(Any, architecture).from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation=reference_attention(config),
            local_files_only=True,
            ignore_mismatched_sizes=bool(heads),
            output_loading_info=True,
        )
    _check_loaded(model, report, heads)
    add_biases(model, heads)
    _take_heads(model, heads, untied)
    return cast("PreTrainedModel", model.eval())


@contextmanager
def quiet_loading() -> Iterator[None]:
    """A context in which transformers shows no load report and no progress bar."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _check_loaded(model: Any, report: Mapping[str, Any], heads: Collection[str]) -> None:
    """Refuse a model of which transformers filled a part with random values that no head is."""
    random = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    tied: dict[str, str] = model.all_tied_weights_keys
    brought = {tied.get(name, name) for name in heads}
    lacking = sorted(name for name in random if tied.get(name, name) not in brought)
    lacking = [name for name in lacking if model.get_parameter_or_buffer(name).is_floating_point()]
    if lacking:
        raise BaseModelError(
            f"{len(lacking)} weights would be random when transformers loads the base: "
            f"{', '.join(lacking[:4])}",
            next_step="use the complete checkpoint, or an adapter that saved these",
        )


def _take_heads(model: Any, heads: Mapping[str, Tensor], untied: Collection[str]) -> None:
    """Untie parameters of a loaded model, and write what the adapters bring."""
    for name in untied:
        owner, _, attribute = name.rpartition(".")
        value = model.get_parameter(name).detach().clone()
        setattr(model.get_submodule(owner), attribute, nn.Parameter(value))
    with torch.no_grad():
        for name, tensor in heads.items():
            model.get_parameter_or_buffer(name).copy_(tensor)


def write_config(
    config: PreTrainedConfig, architecture: type[PreTrainedModel], folder: Path
) -> None:
    """Write config.json for a checkpoint that got another class or heads of its own."""
    config = with_overrides(config, {"architectures": [architecture.__name__]})
    config.to_json_file(folder / "config.json")


def settings_of_generation(config: PreTrainedConfig) -> dict[str, Any]:
    """What generation_config.json says of a model that came without one."""
    from transformers import GenerationConfig

    made: dict[str, Any] = GenerationConfig.from_model_config(config).to_diff_dict()
    return {key: made[key] for key in made if key not in _OF_A_MODEL}
