"""`config.json` and `generation_config.json` beside a graph, for tools that open folders by them.

They describe the model under its adapters: its class, its dtype, its vocabulary and heads, the
tokens that end its texts. transformers' AutoConfig and GenerationConfig read them, and through them
optimum-onnx and sentence-transformers.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bone_fx.deploy.companions.choice import GENERATION_FILE, Companions
from bone_fx.deploy.companions.copying import write_generation_settings
from bone_fx.deploy.companions.reading import write_object

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from bone_fx.deploy.checkpoint_inputs import CheckpointInputs


def write_configuration(
    inputs: CheckpointInputs,
    companions: Companions,
    dtype: torch.dtype,
    folder: Path,
    *,
    generates: bool,
) -> None:
    """Write what describes a model into the folder of its graph.

    Args:
        inputs: The base and its adapters.
        companions: What goes beside the model.
        dtype: Dtype of the activations.
        folder: The folder.
        generates: Whether generation settings are made from the configuration where nobody brings
            any.

    Raises:
        InputRefusedError: generation_config.json or a tokenizer's file cannot be read.
    """
    from bone_fx.base.real_model import settings_of_generation, write_config

    write_config(_of_a_graph(inputs.config, dtype), inputs.architecture, folder)
    settings, changed = companions.generation_settings(inputs.checkpoint.config)
    if companions.generation is not None:
        shutil.copyfile(companions.generation, folder / GENERATION_FILE)
    elif generates:
        settings = settings_of_generation(inputs.config) | settings
        write_object(folder / GENERATION_FILE, settings)
    write_generation_settings(settings, changed, folder)


def _of_a_graph(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedConfig:
    """A copy that has the graph's dtype and names no code, which does not travel with a graph."""
    config = copy.deepcopy(config)
    for each in (config, config.get_text_config()):
        each.dtype = dtype
        vars(each).pop("auto_map", None)
    return config
