"""From a configuration to the model class that it describes, by transformers' own tables."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from bone_fx.errors import BaseModelError

_CONFIG_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OSError,
    ArithmeticError,
    StrictDataclassError,
)


def load_config(folder: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration of a local folder.

    Raises:
        BaseModelError: transformers does not know the model or refuses a value.
    """
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except _CONFIG_ERRORS as error:
        needs_code = "trust_remote_code" in str(error)
        raise BaseModelError(
            f"{folder / 'config.json'} does not describe a model that transformers knows",
            expected=f"a model of transformers {transformers.__version__}",
            found=" ".join(str(error).split())[:300],
            next_step="--trust-remote-code, if you have read and trust the folder's Python files"
            if needs_code
            else "check model_type and the values, or update transformers",
        ) from error
    return cast(PreTrainedConfig, config)


def architecture_of(
    config: PreTrainedConfig, folder: Path, *, trust_remote_code: bool
) -> type[PreTrainedModel]:
    """The first of the configuration's `architectures`, or transformers' plain model for its type.

    Raises:
        BaseModelError: The class is not in transformers, nor in the folder's code if that may be
            run.
    """
    names = config.architectures or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise BaseModelError(
            f"architectures in {folder / 'config.json'} is no list of names",
            found=repr(names)[:200],
            next_step="name the class in config.json's architectures",
        )
    if not names:
        return auto_architecture(config, "AutoModel")
    if trust_remote_code:
        remote = (getattr(config, "auto_map", None) or {}).values()
        reference = next(
            (ref for ref in remote if isinstance(ref, str) and ref.endswith(f".{names[0]}")), None
        )
        if reference is not None:
            return cast(
                type[PreTrainedModel],
                get_class_from_dynamic_module(reference, folder, local_files_only=True),
            )
    cls = getattr(transformers, names[0], None)
    if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
        return cls
    raise BaseModelError(
        f"{folder} is a {names[0]}, which transformers {transformers.__version__} does not have",
        expected="a model class of transformers in config.json's architectures",
        found=names[0],
        next_step="correct architectures, or --trust-remote-code if the folder brings the class",
    )


def named_architecture(config: PreTrainedConfig, name: object) -> type[PreTrainedModel] | None:
    """The class of that name in transformers, if it is a class of this configuration's model."""
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        return None
    return cls if cls.config_class is type(config) else None


def auto_architecture(config: PreTrainedConfig, auto_class: str) -> type[PreTrainedModel]:
    """The class that one of transformers' AutoModel classes takes for a configuration.

    Raises:
        BaseModelError: There is none.
    """
    mapping = getattr(transformers, auto_class)._model_mapping
    if type(config) not in mapping:
        raise BaseModelError(
            f"transformers has no {auto_class} for model_type {config.model_type!r}",
            next_step="name the class in config.json's architectures",
        )
    cls = mapping[type(config)]
    return cast(type[PreTrainedModel], cls[0] if isinstance(cls, (tuple, list)) else cls)


def with_overrides(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of a configuration with some fields set; `vocab_size` is the text model's."""
    config = copy.deepcopy(config)
    for name, value in overrides.items():
        owner = config.get_text_config() if name == "vocab_size" else config
        setattr(owner, name, value)
    return config


def reference_attention(config: PreTrainedConfig) -> str:
    """The attention implementation of transformers that an export is compared with.

    `eager`, which has no kernels of its own. Falcon's (transformers 5.23) adds ALiBi twice, once in
    the mask and once to the scores; its `sdpa`, which is the default, adds it once.
    """
    return "sdpa" if config.model_type == "falcon" else "eager"
