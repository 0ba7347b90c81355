"""The fields of a LoRA's `adapter_config.json` that decide what its tensors mean.

Reference: `LoraConfig` of PEFT 0.18.1 and 0.21.2. Fields that only training reads are left alone;
a field that is not known refuses the folder if it is set.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bone_fx.config import ALL_LINEAR, TASK_TYPES, is_int, is_names, is_str_list
from bone_fx.errors import ConfigError
from bone_fx.lora.refused import FIELDS, INITIALISATIONS, MERGE, is_set
from bone_fx.sites import matches_end

PEFT_TYPE = "LORA"
_LARGEST = 1 << 20
"""No rank and no token is as large."""
_HARMLESS = frozenset(
    {
        # Of training alone, or read with another field only.
        *("lora_dropout", "inference_mode", "init_lora_weights", "fan_in_fan_out", "loftq_config"),
        *("eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
        *("runtime_config", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "subfolder"),
        # Kept for those who read the file.
        *("peft_version", "base_model_name_or_path", "revision", "auto_mapping", "peft_type"),
    }
)
_INITIALISATIONS = ("gaussian", "eva", "orthogonal")


@dataclass
class LoraConfig:
    """Configuration of a LoRA or DoRA adapter.

    Attributes:
        r: Rank.
        lora_alpha: Scale of the product, times r (or times its root).
        use_rslora: Whether the product is scaled by `alpha / √r` in place of `alpha / r`.
        use_dora: Whether the rows of the folded weights have lengths of their own.
        lora_bias: Whether B has a bias.
        rank_pattern: Other ranks by a pattern that ends a layer's name; the first that fits counts.
        alpha_pattern: Other alphas, in the same way.
        target_modules: As in `BoneConfig`.
        target_parameters: Ends of names of parameters that are adapted themselves, such as stacked
            experts.
        exclude_modules: As in `BoneConfig`.
        layers_to_transform: As in `BoneConfig`.
        layers_pattern: As in `BoneConfig`.
        modules_to_save: As in `BoneConfig`.
        trainable_token_indices: Tokens whose embeddings were trained: of the embedding, or by name
            of a layer.
        ensure_weight_tying: Whether layers that are tied were trained as one.
        bias: Whether biases of the base were trained: `"none"`, `"all"` or `"lora_only"`.
        task_type: PEFT's task type.
        base_model_name_or_path: The base the adapter was trained on.
        auto_mapping: Class and module of the base.
        peft_version: The version of PEFT that wrote the file.

    Raises:
        ConfigError: A field has a value that is not allowed.
    """

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | Mapping[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    bias: str = "none"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    auto_mapping: Mapping[str, Any] | None = None
    peft_version: str | None = None

    peft_type = PEFT_TYPE

    @property
    def method(self) -> str:
        """Key of `bone_fx.adapters.METHODS`."""
        return "dora" if self.use_dora else "lora"

    @property
    def mini_r(self) -> int:
        """Only MiSS mini has another."""
        return 0

    def rank(self, name: str) -> int:
        """The rank of a layer or a parameter."""
        return self.rank_pattern.get(_first(self.rank_pattern, name), self.r)

    def scale(self, name: str) -> float:
        """The factor of the product of a layer or a parameter."""
        alpha = self.alpha_pattern.get(_first(self.alpha_pattern, name), self.lora_alpha)
        rank = self.rank(name)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def tokens(self, module: str) -> list[int] | None:
        """The tokens of a module that were trained; None if the configuration does not say."""
        given = self.trainable_token_indices
        if not isinstance(given, Mapping):
            return given
        return next((given[n] for n in given if f".{module}".endswith(f".{n}")), None)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], *, where: str) -> LoraConfig:
        """Build from the content of an `adapter_config.json`.

        Args:
            content: The content.
            where: What a message says that it comes from.

        Raises:
            ConfigError: A value is not allowed, or a field is set that is refused or not known.
        """
        _refuse_fields(content, where)
        values = {name: content[name] for name in _RULES if content.get(name) is not None}
        for name, value in values.items():
            allowed, is_right = _RULES[name]
            if not is_right(value):
                raise ConfigError(
                    f"{where}: {name}={reprlib.repr(value)} is not allowed",
                    expected=allowed,
                    next_step=f"correct {name} in the configuration",
                )
        targets = values.get("target_modules")
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            values["target_modules"] = ALL_LINEAR
        return cls(**values)


def _refuse_fields(content: Mapping[str, Any], where: str) -> None:
    """Refuse a field that is set and says what is not read here."""
    for name, (why, next_step) in FIELDS.items():
        if is_set(content.get(name)):
            raise ConfigError(
                f"{where}: {name} is set: {why}",
                found=f"{name}={reprlib.repr(content[name])}",
                next_step=next_step,
            )
    init = content.get("init_lora_weights")
    begin = next((b for b in INITIALISATIONS if isinstance(init, str) and init.startswith(b)), None)
    if begin is not None:
        why, next_step = INITIALISATIONS[begin]
        raise ConfigError(
            f"{where}: init_lora_weights={reprlib.repr(init)}: {why}",
            expected="a folder that changes no weight of the base when it is loaded",
            next_step=next_step,
        )
    if not (init is None or isinstance(init, bool) or init in _INITIALISATIONS):
        raise ConfigError(
            f"{where}: init_lora_weights={reprlib.repr(init)} is not known",
            expected=f"true, false, {', '.join(_INITIALISATIONS)}",
            next_step=MERGE,
        )
    known = {*LoraConfig.__dataclass_fields__, *_HARMLESS, *FIELDS}
    unknown = [name for name, value in content.items() if name not in known and is_set(value)]
    if unknown:
        raise ConfigError(
            f"{where}: {reprlib.repr(unknown[0])} is set, which this version does not know",
            expected="the fields of PEFT 0.21.2's LoraConfig",
            found=reprlib.repr(content[unknown[0]]),
            next_step=f"{MERGE}; or take the field out, if it says nothing of the tensors",
        )


def _first(pattern: Mapping[str, object], name: str) -> str:
    """The first pattern that ends a name, as PEFT's `get_pattern_key`; the name if there is none.

    Raises:
        SiteError: A pattern is no regular expression, or takes too long.
    """
    return next((key for key in pattern if matches_end(key, name)), name)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value)  # type: ignore[arg-type]


def _is_rank(value: object) -> bool:
    return is_int(value) and 1 <= value < _LARGEST  # type: ignore[operator]


def _is_pattern(value: object, is_right: Callable[[object], bool]) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and is_right(each) for key, each in value.items()
    )


def _are_tokens(value: object) -> bool:
    return isinstance(value, list) and all(is_int(v) and v >= 0 for v in value)


def _are_layers(value: object) -> bool:
    return is_int(value) or (isinstance(value, list) and all(is_int(v) for v in value))


_Rule = tuple[str, Callable[[Any], bool]]
_FLAG: _Rule = ("true or false", _is_flag)
_TEXT: _Rule = ("a text", lambda value: isinstance(value, str))
_NAMES: _Rule = ("a list of names or a regular expression", is_names)
_LIST: _Rule = ("a list of names", is_str_list)
_RULES: Mapping[str, _Rule] = {
    "r": ("a whole number of at least 1", _is_rank),
    "lora_alpha": ("a number", _is_number),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "rank_pattern": ("ranks by pattern", lambda value: _is_pattern(value, _is_rank)),
    "alpha_pattern": ("numbers by pattern", lambda value: _is_pattern(value, _is_number)),
    "target_modules": _NAMES,
    "target_parameters": _LIST,
    "exclude_modules": _NAMES,
    "layers_to_transform": ("whole numbers", _are_layers),
    "layers_pattern": _NAMES,
    "modules_to_save": _LIST,
    "trainable_token_indices": (
        "numbers of tokens, or these by name of a layer",
        lambda value: _are_tokens(value) or _is_pattern(value, _are_tokens),
    ),
    "ensure_weight_tying": _FLAG,
    "bias": ("none, all or lora_only", lambda value: value in ("none", "all", "lora_only")),
    "task_type": (", ".join(TASK_TYPES), lambda value: value in TASK_TYPES),
    "base_model_name_or_path": _TEXT,
    "auto_mapping": ("a dictionary", lambda value: isinstance(value, dict)),
    "peft_version": _TEXT,
}
