"""`BoneConfig`: PEFT's fields and meanings, and clear refusals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists

from bone_fx.config import BoneConfig
from bone_fx.errors import AdapterError, ConfigError
from bone_fx.sites import is_target

NAMES = [
    f"model.layers.{i}.{part}"
    for i in (0, 1, 11)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.gate")
] + ["lm_head", "q_proj", "model.score", "encoder.block.1.layer.0.q_proj"]

RULES: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "up_proj"]},
    {"target_modules": ["self_attn.q_proj", "lm_head"]},
    {"target_modules": r".*layers\.1\..*(q|k)_proj"},
    {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": r".*\.11\..*"},
    {"target_modules": ["q_proj", "gate"], "layers_to_transform": [1, 11]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["block", "h"]},
    {"target_modules": ["q_proj", "score"], "modules_to_save": ["score"]},
]


@pytest.mark.parametrize("rule", RULES)
def test_names_match_as_in_peft(rule: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.BoneConfig(**rule)
    ours = BoneConfig(**rule)
    for name in NAMES:
        found = check_target_module_exists(theirs, name)
        expected = bool(found) and type(found).__name__ != "_ExcludedModule"
        assert is_target(ours, name) == expected, name


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "r=0"),
        ({"r": True}, "r=True"),
        ({"r": 2.5}, "r=2.5"),
        ({"init_weights": "bone"}, "'bat' or 'mini'"),
        ({"init_weights": "mini"}, "mini_r"),
        ({"miss_dropout": 1.0}, "miss_dropout=1.0"),
        ({"bias": "all"}, "'none'"),
        ({"target_modules": 3}, "target_modules=3"),
        ({"target_modules": ".*", "layers_to_transform": 1}, "layers_to_transform"),
        ({"peft_type": "LORA"}, "peft_type='LORA'"),
        ({"peft_type": "BONE", "miss_dropout": 0.1}, "'MISS'"),
    ],
)
def test_wrong_values_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        BoneConfig(**fields)
    assert words in str(refusal.value)


def test_unknown_fields_are_kept(tmp_path: Path) -> None:
    content = {
        "peft_type": "MISS",
        "r": 14,
        "mini_r": 8,
        "init_weights": "mini",
        "revision": "main",
        "new": [1],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    config = BoneConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert again.items() >= {**content, "new": [1]}.items()


@pytest.mark.parametrize(
    "content", ["{", "[]", "\udcff", '{"peft_type": "LORA"}', '{"peft_type": "BONE", "r": "8"}']
)
def test_broken_files_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises((AdapterError, ConfigError), match=r"adapter_config\.json"):
        BoneConfig.from_pretrained(tmp_path)


def test_the_saved_type_follows_the_fields() -> None:
    assert BoneConfig().peft_type == "BONE"
    assert BoneConfig(init_weights="bat").peft_type == "BONE"
    assert BoneConfig(miss_dropout=0.1).peft_type == "MISS"
    assert BoneConfig(init_weights="mini", mini_r=8).peft_type == "MISS"
