"""The tables of docs/peft.md name every verb and field of PEFT's, and say what is true."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import peft
import pytest
from peft.tuners.bone import BoneModel
from peft.tuners.miss import MissModel
from torch import nn

import bone_fx

TEXT = (Path(__file__).parents[2] / "docs" / "peft.md").read_text(encoding="utf-8")
ANSWERS = ("same", "different", "absent")


def rows(title: str) -> dict[str, tuple[str, str]]:
    """Answer and reason by name, of the table under a heading."""
    section = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| `(\w+)` \| (\w+) \| ?(.*?) ?\|$", section, re.MULTILINE)
    assert len({name for name, *_ in found}) == len(found)
    return {name: (answer, reason) for name, answer, reason in found}


def test_every_verb_of_peft_has_a_row() -> None:
    inherited = set(dir(nn.Module()))
    verbs = {
        name
        for kind in (peft.PeftModel, BoneModel, MissModel)
        for name in dir(kind)
        if not name.startswith("_") and name not in inherited
    }
    assert verbs <= rows("Verbs").keys()
    assert all(answer in ANSWERS for answer, _ in rows("Verbs").values())


@pytest.mark.parametrize("verb", rows("Verbs"))
def test_a_row_says_what_is_there(verb: str) -> None:
    answer, reason = rows("Verbs")[verb]
    assert hasattr(bone_fx.AdaptedModule, verb) is (answer != "absent") or verb == "active_adapters"
    assert reason or answer == "same"


def test_every_field_of_pefts_configurations_has_a_row() -> None:
    theirs = {
        field.name
        for kind in (peft.BoneConfig, peft.MissConfig)
        for field in dataclasses.fields(kind)
    }
    ours = {field.name for field in dataclasses.fields(bone_fx.BoneConfig)}
    table = rows("Fields of the configuration")
    assert table.keys() == theirs
    assert {name for name, (answer, _) in table.items() if answer != "absent"} == theirs & ours
    assert all(reason for answer, reason in table.values() if answer != "same")
