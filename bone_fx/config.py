"""`BoneConfig`: PEFT's own fields and meanings, for `peft_type` BONE and MISS.

Reference: `BoneConfig` of PEFT 0.18.1 and `MissConfig` of PEFT 0.18.1 and 0.21.2,
`adapter_config.json` included. A field that we do not know is kept and written back.
"""

from __future__ import annotations

import enum
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from bone_fx.errors import AdapterError, ConfigError, UsageError
from bone_fx.files.json_file import NotJsonError, read_object

CONFIG_NAME = "adapter_config.json"
ALL_LINEAR = "all-linear"
INIT_WEIGHTS = (True, False, "bat", "mini")
PEFT_TYPES = ("BONE", "MISS")
PEFT_VERSION = "0.18.1"
"""The version of PEFT whose files these are; noted in a configuration that has none."""
TASK_TYPES = (
    *("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS"),
    "FEATURE_EXTRACTION",
)
_LARGEST = 1 << 31
"""No layer is as wide."""
_METHOD_OF_INIT: dict[bool | str, str] = {True: "bone", False: "bone", "bat": "bat", "mini": "mini"}


@dataclass
class BoneConfig:
    """Configuration of one block adapter.

    Attributes:
        r: Block size R, at least 1.
        target_modules: Names to adapt: a list of names or name suffixes, one regular expression
            that must match a whole name, or `"all-linear"` (every linear layer but the output
            layer).
        exclude_modules: Names to leave alone, same forms as `target_modules`.
        init_weights: `True` (zeros) or `False` (Kaiming uniform) for Bone, `"bat"` for BAT,
            `"mini"` for MiSS mini.
        layers_to_transform: Layer index or indices to adapt; only with a list of `target_modules`.
        layers_pattern: Name of the list of layers that `layers_to_transform` counts in.
        bias: Only `"none"`: PEFT trains other biases but never saves them.
        modules_to_save: Modules, besides the blocks, that are trained and saved whole.
        mini_r: Width M of a mini block; it must divide every adapted layer's out_features.
        miss_dropout: Dropout probability on the adapter's input while training, in [0, 1). BAT
            ignores it, as in PEFT.
        task_type: PEFT's task type: with `"SEQ_CLS"` and `"TOKEN_CLS"` the head trains too.
        base_model_name_or_path: The base the adapter was trained on, kept for those who read the
            file.
        revision: Revision of that base, kept.
        inference_mode: Whether a fresh adapter starts frozen; True in saved adapters.
        peft_type: `"BONE"` or `"MISS"`; chosen from the other fields when None.
        auto_mapping: Class and module of the base, which PEFT's `AutoPeftModel` opens it with.
        peft_version: The version of PEFT that the file is of.
        extra: Fields of `adapter_config.json` that are not ours, kept as they came.

    Raises:
        ConfigError: A field has a value that is not allowed; the message names field, value and
            what is allowed.

    Examples:
        >>> config = BoneConfig(r=16, target_modules=["q_proj", "v_proj"])
        >>> config.method, config.peft_type
        ('bone', 'BONE')
        >>> BoneConfig(r=16, init_weights="bat", target_modules="all-linear").method
        'bat'
    """

    r: int = 64
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | Literal["bat", "mini"] = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    mini_r: int = 0
    miss_dropout: float = 0.0
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    peft_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, set | frozenset):
                setattr(self, name, sorted(value))
            elif isinstance(value, tuple):
                setattr(self, name, list(value))
        for name in ("task_type", "peft_type"):
            if isinstance(getattr(self, name), enum.Enum):  # PEFT's own
                setattr(self, name, str(getattr(self, name).value))
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            self.target_modules = ALL_LINEAR
        self._check_values()
        if self.peft_type is None:
            self.peft_type = "MISS" if self._needs_miss else "BONE"
        if self.peft_version is None:
            self.peft_version = PEFT_VERSION

    @property
    def method(self) -> str:
        """Key of `bone_fx.adapters.METHODS`."""
        return _METHOD_OF_INIT[self.init_weights]

    @property
    def is_prompt_learning(self) -> bool:
        """What PEFT and TRL ask of a configuration: False, here are blocks."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """What PEFT asks of a configuration: False, here are blocks."""
        return False

    @property
    def _needs_miss(self) -> bool:
        return self.init_weights == "mini" or self.mini_r != 0 or self.miss_dropout != 0.0

    def _check_values(self) -> None:
        r_ok = is_int(self.r) and 1 <= self.r < _LARGEST
        _require("r", self.r, r_ok, "an integer of at least 1")
        allowed = any(
            self.init_weights is v if isinstance(v, bool) else self.init_weights == v
            for v in INIT_WEIGHTS
        )
        _require("init_weights", self.init_weights, allowed, "True, False, 'bat' or 'mini'")
        names = "a list of names, a regular expression or 'all-linear'"
        _require("target_modules", self.target_modules, is_names(self.target_modules), names)
        _require(
            "exclude_modules",
            self.exclude_modules,
            is_names(self.exclude_modules),
            "a list of names or a regular expression",
        )
        saved_ok = self.modules_to_save is None or is_str_list(self.modules_to_save)
        _require("modules_to_save", self.modules_to_save, saved_ok, "a list of module names")
        layers_ok = self.layers_to_transform is None or is_int(self.layers_to_transform)
        if isinstance(self.layers_to_transform, list):
            layers_ok = all(is_int(i) for i in self.layers_to_transform)
        _require(
            "layers_to_transform",
            self.layers_to_transform,
            layers_ok,
            "an integer or a list of integers",
        )
        pattern_ok = self.layers_pattern is None or is_names(self.layers_pattern)
        _require("layers_pattern", self.layers_pattern, pattern_ok, "a name or a list of names")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                rule = "None when target_modules is a string (PEFT's rule)"
                _require(name, getattr(self, name), getattr(self, name) is None, rule)
        _require(
            "bias",
            self.bias,
            self.bias == "none",
            "'none' (PEFT trains other biases but never saves them)",
        )
        _require(
            "mini_r",
            self.mini_r,
            is_int(self.mini_r) and 0 <= self.mini_r < _LARGEST,
            "an integer of at least 0",
        )
        if self.init_weights == "mini":
            _require("mini_r", self.mini_r, self.mini_r >= 1, "at least 1 with init_weights='mini'")
        dropout = self.miss_dropout
        dropout_ok = (
            isinstance(dropout, int | float)
            and not isinstance(dropout, bool)
            and 0.0 <= dropout < 1.0
        )
        _require("miss_dropout", dropout, dropout_ok, "a probability in [0, 1)")
        for name in ("base_model_name_or_path", "revision", "peft_version"):
            value = getattr(self, name)
            _require(name, value, value is None or isinstance(value, str), "a text or nothing")
        tasks = (None, *TASK_TYPES)
        _require("task_type", self.task_type, self.task_type in tasks, ", ".join(TASK_TYPES))
        mapping_ok = self.auto_mapping is None or isinstance(self.auto_mapping, dict)
        _require("auto_mapping", self.auto_mapping, mapping_ok, "a dictionary or nothing")
        is_flag = isinstance(self.inference_mode, bool)
        _require("inference_mode", self.inference_mode, is_flag, "True or False")
        _require(
            "peft_type", self.peft_type, self.peft_type in (None, *PEFT_TYPES), "'BONE' or 'MISS'"
        )
        if self.peft_type == "BONE":
            _require(
                "peft_type", "BONE", not self._needs_miss, "'MISS' for mini, mini_r or miss_dropout"
            )

    def to_dict(self) -> dict[str, Any]:
        """The content of `adapter_config.json`, as PEFT of the matching type reads it."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        if self.peft_type == "BONE":
            del values["mini_r"], values["miss_dropout"]
        return dict(sorted({**self.extra, **values}.items()))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `adapter_config.json` into a folder, which is made if needed."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def of(cls, config: Any) -> BoneConfig:
        """A configuration as it is, or made of PEFT's own `BoneConfig` or `MissConfig`.

        Raises:
            ConfigError: A configuration of another kind, or a value that is not allowed.
            UsageError: It is no configuration.
        """
        if isinstance(config, BoneConfig):
            return config
        to_dict = getattr(config, "to_dict", None)
        if not callable(to_dict) or not hasattr(config, "peft_type"):
            raise UsageError(
                f"{reprlib.repr(config)} is no configuration of an adapter",
                expected="a BoneConfig, or PEFT's BoneConfig or MissConfig",
                found=type(config).__name__,
            )
        content = {
            name: str(value.value) if isinstance(value, enum.Enum) else value
            for name, value in to_dict().items()
        }
        return BoneConfig.from_dict(content, where=f"the {type(config).__name__}")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], *, where: str = CONFIG_NAME) -> BoneConfig:
        """Build from the content of an `adapter_config.json`.

        Raises:
            ConfigError: A value that is not allowed, or a `peft_type` other than BONE and MISS.
        """
        kind = content.get("peft_type")
        if kind not in PEFT_TYPES:
            raise ConfigError(
                f"{where}: peft_type {reprlib.repr(kind)} is not a block adapter",
                expected="'BONE' or 'MISS'",
                found=reprlib.repr(kind),
                next_step="export adapters of other types with their own tools",
            )
        names = {f.name for f in fields(cls)} - {"extra"}
        values = {
            name: value for name, value in content.items() if name in names and value is not None
        }
        extra = {name: value for name, value in content.items() if name not in names}
        try:
            return cls(**values, extra=extra)
        except ConfigError as error:
            raise ConfigError(
                f"{where}: {error.what}",
                expected=error.expected,
                found=error.found,
                next_step=error.next_step,
            ) from None

    @classmethod
    def from_pretrained(cls, directory: str | Path, subfolder: str | None = None) -> BoneConfig:
        """Read `adapter_config.json` from an adapter folder, or from a folder in it.

        Raises:
            AdapterError: The file is missing or not JSON.
            ConfigError: A value in it is not allowed.
        """
        path = Path(directory, subfolder or "", CONFIG_NAME)
        return cls.from_dict(cls.from_json_file(path), where=str(path))

    @staticmethod
    def from_json_file(path_json_file: str | Path) -> dict[str, Any]:
        """The fields of an `adapter_config.json` as they are, without PEFT's `runtime_config`.

        Raises:
            AdapterError: The file is missing or not JSON.
        """
        content = read_configuration(Path(path_json_file))
        return {name: value for name, value in content.items() if name != "runtime_config"}


@dataclass
class MissConfig(BoneConfig):
    """`BoneConfig` with the defaults of PEFT's `MissConfig`: its type, and `mini_r=1`.

    Examples:
        >>> MissConfig(r=16, target_modules="all-linear").peft_type
        'MISS'
    """

    mini_r: int = 1
    peft_type: str | None = "MISS"


def read_configuration(path: Path) -> dict[str, Any]:
    """The content of an `adapter_config.json`.

    Raises:
        AdapterError: The file is missing or not JSON.
    """
    try:
        return read_object(path)
    except FileNotFoundError:
        raise AdapterError(
            f"no {path.name} in {path.parent}",
            expected="a folder as PEFT's save_pretrained writes it",
            next_step="check the path of the adapter",
        ) from None
    except NotJsonError as error:
        raise AdapterError(
            f"{path} cannot be read as a JSON object",
            found=str(error),
            next_step="save or copy the adapter again",
        ) from None


def _require(name: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        shown = reprlib.repr(value)
        raise ConfigError(
            f"{name}={shown} is not allowed",
            expected=allowed,
            next_step=f"correct {name} in the configuration",
        )


def is_int(value: object) -> bool:
    """Whether a value of a configuration is a whole number, and no flag."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_str_list(value: object) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def is_names(value: object) -> bool:
    """Whether a value chooses layers: nothing, a text or a list of texts."""
    return value is None or isinstance(value, str) or is_str_list(value)
