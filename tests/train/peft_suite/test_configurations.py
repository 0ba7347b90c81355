"""Configurations: PEFT's tests of them, beside PEFT 0.18.1."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest

import bone_fx
from bone_fx.errors import ConfigError
from tests.train.peft_suite.rows import config

both = pytest.mark.parametrize("kind", [bone_fx.BoneConfig, bone_fx.MissConfig])


@both
def test_a_configuration_is_read_as_it_was_written(kind: Any, tmp_path: Path) -> None:
    made = kind(r=8, target_modules=["a", "b"])
    made.save_pretrained(tmp_path)
    assert kind.from_pretrained(tmp_path) == made
    file = tmp_path / "adapter_config.json"
    assert kind.from_json_file(file) == made.to_dict()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Bone will be removed")
        theirs = peft.PeftConfig.from_pretrained(tmp_path)
    file.write_text(json.dumps({**made.to_dict(), "runtime_config": {"some": True}}))
    assert kind.from_json_file(file) == made.to_dict()
    assert bone_fx.BoneConfig.of(theirs).to_dict() == made.to_dict()


@both
def test_copies_are_equal(kind: Any) -> None:
    made = kind(r=8, target_modules=["a"])
    for copied in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert copied.to_dict() == made.to_dict()
        assert type(copied) is kind


@both
@pytest.mark.parametrize("task", [*peft.TaskType, None])
def test_task_types(kind: Any, task: Any) -> None:
    assert kind(task_type=task).task_type == (task and task.value)


@both
def test_the_first_layer_has_an_index(kind: Any) -> None:
    made = kind(target_modules=["a"], layers_to_transform=0, layers_pattern="model.layers")
    assert (made.layers_to_transform, made.layers_pattern) == (0, "model.layers")


@both
@pytest.mark.parametrize("version", ["0.10", "0.17.0", "1"])
def test_the_version_of_peft_is_noted(kind: Any, version: str, tmp_path: Path) -> None:
    assert kind().peft_version == peft.__version__
    kind(peft_version=version).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_version"] == version
    assert kind.from_pretrained(tmp_path).peft_version == version


@both
def test_a_file_that_is_no_configuration_is_refused(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"foo": "bar", "baz": 123}))
    with pytest.raises(ConfigError, match="peft_type"):
        kind.from_pretrained(tmp_path)


# What differs, with its reason, in docs/peft.md.


@both
def test_fields_of_later_versions_are_kept(kind: Any, tmp_path: Path) -> None:
    content = {**kind().to_dict(), "foobar": "baz", "spam": 123}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    read = kind.from_pretrained(tmp_path)
    assert read.extra == {"foobar": "baz", "spam": 123}
    assert read.to_dict() == content


@both
def test_configurations_of_other_types_are_refused(kind: Any, tmp_path: Path) -> None:
    peft.LoraConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="LORA"):
        kind.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="peft_type"):
        kind(peft_type="test")


def test_a_configuration_that_is_given_stays_as_it_is(tmp_path: Path) -> None:
    from tests.train.peft_models import net, x_of_net
    from tests.train.peft_suite.rows import ours

    ours(config("Bone 2")).save_pretrained(tmp_path)
    given = bone_fx.BoneConfig.of(config("Bone 2"))
    loaded = bone_fx.PeftModel.from_pretrained(
        net(), tmp_path, config=given, example_inputs=(x_of_net(),)
    )
    assert loaded.peft_config["default"].inference_mode
    assert not given.inference_mode
