"""What stands beside the weights of a folded checkpoint, so that it loads as its base does."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from bone_fx.base.left_over import ADAPTER_CONFIG
from bone_fx.deploy.companions.choice import choose_companions, companion_files
from bone_fx.deploy.companions.copying import copy_companions, write_generation_settings
from bone_fx.deploy.companions.left_out import files_left_out
from bone_fx.deploy.companions.sentence_model import copy_sentence_files
from bone_fx.deploy.earlier_output import MANIFEST

if TYPE_CHECKING:
    from pathlib import Path

    from bone_fx.deploy.checkpoint_inputs import CheckpointInputs

INDEX_SUFFIX = ".safetensors.index.json"
_BESIDE_WEIGHTS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm")
_OTHER_WEIGHTS = (".bin.index.json", ".h5.index.json", ".msgpack.index.json")


def copy_the_rest(inputs: CheckpointInputs, model: Any, folder: Path) -> list[str]:
    """Copy configuration, tokenizer and what else stands beside the weights; returns notes.

    Args:
        inputs: The base and the adapters.
        model: The model that is folded, with the embeddings that the adapters bring.
        folder: The folder with the folded weights.

    Raises:
        InputRefusedError: A file cannot be read, or an adapter's tokenizer does not fit.
    """
    from bone_fx.base.real_model import write_config

    checkpoint = inputs.checkpoint
    base = checkpoint.folder
    companions = choose_companions(base, inputs.adapters)
    companions.check_vocabulary(model)
    by_themselves = {path.name for path in companion_files(base)} | {MANIFEST, ADAPTER_CONFIG}
    kinds = (*_BESIDE_WEIGHTS, *((".py",) if checkpoint.trust_remote_code else ()))
    for path in sorted(base.iterdir()):
        is_index = path.name.endswith((INDEX_SUFFIX, *_OTHER_WEIGHTS))
        travels = path.suffix in kinds and not is_index and path.name not in by_themselves
        if travels and path.is_file():
            shutil.copyfile(path, folder / path.name)
    copy_sentence_files(base, inputs.adapters, folder)
    is_another = inputs.architecture is not checkpoint.architecture
    if inputs.overrides or inputs.untied or is_another:
        write_config(inputs.config, inputs.architecture, folder)
    copy_companions(companions, folder)
    if companions.generation is not None:
        shutil.copyfile(companions.generation, folder / companions.generation.name)
    settings, changed = companions.generation_settings(checkpoint.config)
    write_generation_settings(settings, changed, folder)
    none = not companions.tokenizer and not companions.processors
    return [
        *companions.notes,
        *(["the base folder has no tokenizer; the output has none either"] if none else []),
        *companions.token_notes(changed),
        *files_left_out(checkpoint, inputs.adapters),
    ]
