"""The checkpoint with its weights, as transformers runs it.

The reference that verification compares with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.utils import logging as _logging

from bone_fx.base.architectures import reference_attention, with_overrides
from bone_fx.base.left_over import without_adapter
from bone_fx.base.loading import BaseCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logging: Any = _logging  # without annotations in transformers


def load_model(
    base: BaseCheckpoint,
    architecture: type[PreTrainedModel],
    overrides: Mapping[str, Any],
    heads: Mapping[str, Tensor],
) -> PreTrainedModel:
    """The model in float32 and eval mode, with its real weights.

    Args:
        base: The base model.
        architecture: The class to load.
        overrides: Fields of the configuration to set.
        heads: Parameters that the caller supplies afterwards; transformers' notice about fresh ones
            is not shown.
    """
    config = with_overrides(base.config, overrides)
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with without_adapter(base.folder) as folder:
            model: Any = architecture.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation=reference_attention(config),
                local_files_only=True,
                ignore_mismatched_sizes=bool(heads),
            )
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
    return cast("PreTrainedModel", model.eval())


def write_config(
    base: BaseCheckpoint,
    architecture: type[PreTrainedModel],
    overrides: Mapping[str, Any],
    folder: Path,
) -> None:
    """Write config.json for a checkpoint that got another class or a head of another size."""
    config = with_overrides(base.config, overrides)
    config.architectures = [architecture.__name__]
    config.to_json_file(folder / "config.json")
