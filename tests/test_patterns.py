"""Patterns of a configuration: what `re` answers, and never longer than a moment."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bone_fx.config import BoneConfig
from bone_fx.errors import SiteError
from bone_fx.sites import LinearSite, is_saved_module, is_target, select_sites

NAMES = [
    *(
        f"model.layers.{i}.{part}"
        for i in (0, 7, 11, 31)
        for part in ("self_attn.q_proj", "mlp.up")
    ),
    *("lm_head", "encoder.block.1.layer.0.DenseReluDense.wi_0", "transformer.h.0.attn.c_attn", "é"),
    "model.vision_tower.vision_model.encoder.layers.3.self_attn.out_proj",
]
ORDINARY = [
    r".*\.(q|k|v)_proj",
    r"model\.layers\.\d+\..*",
    r"model\.layers\.(0|1[01]?)\.mlp\.up",
    r".*layers\.([0-9]|1\d)\.self_attn\.(q_proj|out_proj)$",
    r"^(?!.*vision).*proj$",
    r".*(?<=self_attn)\.q_proj",
    r"(?i)MODEL\..*",
    r"(?P<stack>\w+)\.h\.\d+\.attn\.c_attn",
    r"[\w.]+",
    r"\w+",
    r"(?:[a-z_]+\.)*[a-z_]+",
    r".*\.(?:wi_\d|up)",
    r"lm_head|.*c_attn",
    r".{3,40}",
    r"(model)\.(layers).*\1?",
    r"",
]
HOPELESS = [
    r"(?:\w|\.|[a-z])+(?=#)",
    r"(\w|\w\w|\.)+[^\w.]",
    r"(?:(\w)|(\.)|.)*(?(1)#|#)",
    "(x{5000}){5000}",
    "(((a{1,500}){500}){500}){1,9}",
    "x{99999999999}",
    "(" * 3000,
    "a|" * 6000,
    "(?R)",
    "(?e:proj){e<=3}",
    "[",
    "\\",
    "(?P<a>x)(?P<a>y)",
]
"""`re` needs for ever, or they are no patterns."""
QUICK_IN_REGEX = ["([a-z0-9_.]+)+!", "(.*)*(.*)*(.*)*(.*)*!"]
"""`re` needs for ever, `regex` sees that they match nothing."""


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_patterns_match_as_in_re(pattern: str) -> None:
    targets, excluded = (
        BoneConfig(target_modules=pattern),
        BoneConfig(target_modules="all-linear", exclude_modules=pattern),
    )
    for name in NAMES:
        expected = bool(pattern) and re.fullmatch(pattern, name) is not None
        assert is_target(targets, name) == expected, name
        assert is_target(excluded, name) != expected, name


@pytest.mark.parametrize("pattern", HOPELESS)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save"])
def test_a_pattern_that_cannot_be_matched_is_refused_at_once(field: str, pattern: str) -> None:
    fields: dict[str, Any] = {"target_modules": ["q_proj"]}
    fields[field] = [pattern] if field == "modules_to_save" else pattern
    config = BoneConfig(**fields)
    sites = [LinearSite(name, f"{name}.weight", 8, 8) for name in NAMES]
    with pytest.raises(SiteError, match="regular expression"):
        select_sites(config, sites)


@pytest.mark.parametrize("pattern", QUICK_IN_REGEX)
def test_a_pattern_that_regex_is_quick_with(pattern: str) -> None:
    config = BoneConfig(target_modules="all-linear", exclude_modules=pattern)
    assert all(is_target(config, name) for name in NAMES)


def test_a_name_that_no_pattern_of_layers_may_have_a_group_in() -> None:
    config = BoneConfig(
        target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="(layers|h)"
    )
    with pytest.raises(SiteError, match="a group of its own"):
        is_target(config, NAMES[0])
    with pytest.raises(SiteError, match="is not a regular expression"):
        is_saved_module(BoneConfig(modules_to_save=["a{1000000}"]), "a")
