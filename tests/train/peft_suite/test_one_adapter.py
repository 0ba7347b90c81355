"""One adapter on a small net: PEFT's generic tests of custom models, beside PEFT 0.18.1."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import bone_fx
from bone_fx.errors import UsageError
from tests.train.peft_models import net, peft_load, x_of_net
from tests.train.peft_suite.rows import (
    base,
    close,
    config,
    give,
    moved,
    ours,
    output,
    pair,
    rows,
    states,
    theirs,
    trained,
    training,
)

X = (x_of_net(),)


def load(folder: Path, **options: Any) -> bone_fx.AdaptedModule:
    return bone_fx.PeftModel.from_pretrained(net(), folder, example_inputs=X, **options)


@rows()
def test_training_moves_what_pefts_moves_and_nothing_else(row: str, tmp_path: Path) -> None:
    mine, other = ours(config(row)), theirs(config(row))
    close(output(mine), output(base()))
    before = {name: p.clone() for name, p in mine.named_parameters()}
    for module in (mine, other):
        trained(module)
    actual, expected = states(mine, other)
    close(actual, expected)
    close(output(mine), output(other))
    for name, parameter in mine.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad
    assert training(mine) == training(other)
    mine.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert bone_fx.get_peft_model_state_dict(again).keys() == actual.keys()
    close(bone_fx.get_peft_model_state_dict(again), actual, atol=0)
    close(again(*X), output(mine))
    assert again.state_dict().keys() == mine.state_dict().keys()


@rows()
def test_adapters_off_are_the_base_merged_or_not(row: str) -> None:
    mine = ours(config(row))
    before = output(base())
    trained(mine)
    after = output(mine)
    assert (after - before).abs().max() > 1e-3
    for merged in (False, True):
        if merged:
            mine.merge_adapter()
        close(output(mine), after, atol=1e-5)
        with mine.disable_adapter():
            close(output(mine), before, atol=0)
        close(output(mine), after, atol=1e-5)


@rows()
def test_contexts_without_adapters_nest_and_leave_what_was(row: str) -> None:
    mine = ours(config(row))
    assert mine.has_active_enabled_adapter
    with mine.disable_adapter():
        with mine.disable_adapter():
            assert not mine.has_active_enabled_adapter
        assert not mine.has_active_enabled_adapter
    assert mine.has_active_enabled_adapter
    mine.disable_adapter_layers()
    with mine.disable_adapter():
        pass
    assert not any(status.enabled for status in mine.get_layer_status())


@rows()
def test_merging_changes_no_output(row: str, tmp_path: Path) -> None:
    mine, other = pair(config(row))
    expected, plain = output(mine), output(base())
    close(expected, output(other))
    assert (expected - plain).abs().max() > 1e-3
    for safe in (False, True):
        mine.merge_adapter(safe_merge=safe)
        close(output(mine), expected, atol=1e-5)
        with pytest.warns(UserWarning, match="merged already"):
            mine.merge_adapter()
        close(output(mine), expected, atol=1e-5)
        mine.unmerge_adapter()
        close(output(mine), expected, atol=0)
    for safe in (False, True):
        folded = mine.merge_and_unload(safe_merge=safe)
        assert type(folded) is type(base())
        assert not hasattr(folded, "peft_config")
        assert folded.state_dict().keys() == base().state_dict().keys()
        close(output(folded), expected, atol=1e-5)
        close(output(pickle.loads(pickle.dumps(folded))), expected, atol=1e-5)
        save_file(folded.state_dict(), tmp_path / "model.safetensors")
        torch.save(folded.state_dict(), tmp_path / "model.bin")
        close(load_file(tmp_path / "model.safetensors"), torch.load(tmp_path / "model.bin"))
    close(output(other.merge_and_unload()), expected, atol=1e-5)
    close(output(mine.unload()), plain, atol=0)


@rows()
def test_merging_while_training_draws_nothing(row: str) -> None:
    dropout = {"miss_dropout": 0.5} if row.startswith("MiSS") else {}
    mine = ours(config(row, **dropout)).train()
    moved(mine)
    twin = copy.deepcopy(mine)
    weights = []
    for module in (mine, twin):
        module.merge_adapter()
        weights.append(module.get_parameter("lin0.weight"))
    close(weights[0], weights[1], atol=0)


@rows()
def test_names_sizes_and_verbs(row: str) -> None:
    given = config(row)
    mine, other = ours(given, "test-adapter"), theirs(given, "test-adapter")
    assert sum("test-adapter" in name for name, _ in mine.named_parameters()) > 0
    assert training(mine) == training(other, "test-adapter")
    for verb in ("save_pretrained", "from_pretrained", "push_to_hub"):
        assert callable(getattr(mine, verb))
    for name in mine.targeted_module_names:
        layer: Any = mine.get_submodule(name)
        like = getattr(base(), name)
        assert (layer.in_features, layer.out_features) == (like.in_features, like.out_features)
    assert torch.isfinite(output(mine)).all()


@rows()
def test_deleting_adapters(row: str) -> None:
    given = config(row)
    for active in (True, False):
        mine = ours(given)
        mine.add_adapter("delete_me", given)
        if active:
            mine.set_adapter("delete_me")
            with pytest.warns(UserWarning, match="'default' is active"):
                mine.delete_adapter("delete_me")
        else:
            mine.delete_adapter("delete_me")
        assert mine.peft_config.keys() == {"default"}
        assert mine.active_adapters == ["default"]
        with pytest.raises(ValueError, match="unknown-adapter"):
            mine.delete_adapter("unknown-adapter")
        mine.delete_adapter("default")
        assert mine.active_adapters == []
        assert mine.peft_config == {}
        assert mine.get_layer_status() == []
        assert not [name for name in mine.state_dict() if "delete_me" in name or "default" in name]
        close(mine.eval().base_model(*X), output(base()), atol=0)


@rows()
def test_what_is_merged_is_not_deleted(row: str) -> None:
    given = config(row)
    mine = ours(given, "adapter0")
    mine.add_adapter("adapter1", given)
    mine.set_adapter("adapter1")
    moved(mine, "adapter1")
    mine.merge_adapter()
    merged = output(mine)
    with pytest.raises(UsageError, match="unmerge"):
        mine.delete_adapter("adapter1")
    assert mine.peft_config.keys() == {"adapter0", "adapter1"}
    mine.delete_adapter("adapter0")
    assert mine.merged_adapters == ["adapter1"]
    close(output(mine), merged, atol=0)
    mine.unmerge_adapter()
    mine.delete_adapter("adapter1")
    assert mine.peft_config == {}


@rows([row for kind in ("Bone", "MiSS") for row in (f"{kind} 1", f"{kind} 3", f"{kind} 3 bat")])
def test_active_adapters(row: str) -> None:
    mine, other = ours(config(row)), theirs(config(row))
    seen: list[list[Any]] = [[], []]
    for module, noted in zip((mine, other), seen, strict=True):
        noted += [module.active_adapters, module.active_adapter]
        module.add_adapter("other", config(row))
        noted += [module.active_adapters, module.active_adapter]
        module.set_adapter("other")
        noted += [module.active_adapters, module.active_adapter]
        module.base_model.set_adapter(["default", "other"])
        noted += [module.active_adapters, module.base_model.active_adapter]
    assert seen[0] == seen[1]


@rows()
@pytest.mark.parametrize("safe", [True, False])
def test_files(row: str, safe: bool, tmp_path: Path) -> None:
    mine = ours(config(row))
    moved(mine)
    mine.add_adapter("new_adapter", config(row))
    moved(mine, "new_adapter")
    mine.save_pretrained(tmp_path, safe_serialization=safe)
    tensors = "adapter_model.safetensors" if safe else "adapter_model.bin"
    for folder in (tmp_path, tmp_path / "new_adapter"):
        files = {path.name for path in folder.iterdir() if path.is_file()}
        assert files - {"README.md"} == {tensors, "adapter_config.json"}
    head = (tmp_path / "README.md").read_text().split("---")[1]
    assert "library_name: peft" in head
    assert "base_model:" not in head  # a net of one's own has no name
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True
    other = peft_load(net(), tmp_path)
    assert other.peft_config.keys() == {"default"}
    close(other(*X), output(mine))
    if safe:
        again = ours(config(row), "first_of_all")
        for name, folder in (("default", tmp_path), ("new_adapter", tmp_path / "new_adapter")):
            assert again.load_adapter(folder, name).missing_keys == []
            close(
                bone_fx.get_peft_model_state_dict(again, adapter_name=name),
                bone_fx.get_peft_model_state_dict(mine, adapter_name=name),
                atol=0,
            )


@rows()
def test_a_name_in_another_name_is_not_saved(row: str, tmp_path: Path) -> None:
    mine = ours(config(row))
    expected = bone_fx.get_peft_model_state_dict(mine).keys()
    for name in ("default2", "other_default", "foodefault_bar", "efaul"):
        mine.add_adapter(name, config(row))
    mine.save_pretrained(tmp_path, selected_adapters=["default"])
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == expected
    assert not list(tmp_path.glob("*/adapter_config.json"))


@rows()
def test_loading_several_and_with_little_memory(row: str, tmp_path: Path) -> None:
    mine, _ = pair(config(row))
    mine.save_pretrained(tmp_path)
    again = load(tmp_path, device_map={"": "cpu"}, low_cpu_mem_usage=True)
    for name in ("other", "yet-another"):
        result = again.load_adapter(tmp_path, adapter_name=name, low_cpu_mem_usage=True)
        assert result.missing_keys == []
    assert {parameter.device.type for parameter in again.parameters()} == {"cpu"}
    again.set_adapter("yet-another")
    close(output(again), output(mine), atol=0)


@pytest.mark.parametrize("kind", ["Bone", "MiSS"])
def test_the_name_of_an_adapter_makes_no_difference(kind: str) -> None:
    states_of, outputs = [], []
    for name in ("default", "adapter", "other-name"):
        torch.manual_seed(0)
        mine = ours(config(f"{kind} 2", init_weights=False), name)
        states_of.append(bone_fx.get_peft_model_state_dict(mine, adapter_name=name))
        outputs.append(output(mine))
    close(states_of[1:], states_of[:1] * 2, atol=0)
    close(outputs[1:], outputs[:1] * 2, atol=0)
    assert (outputs[0] - output(base())).abs().max() > 1e-3


@rows(["MiSS 3", "Bone 5 bat", "Bone 5", "MiSS 3 bat"])
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16]
)
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(row: str, dtype: torch.dtype, autocast: bool, tmp_path: Path) -> None:
    x = x_of_net().to(dtype)
    given = config(row, **({} if "bat" in row else {"init_weights": False}))
    mine = ours(given, dtype=dtype, autocast_adapter_dtype=autocast).eval()
    other = peft.get_peft_model(net().to(dtype), given, autocast_adapter_dtype=autocast).eval()
    moved(mine)
    give(other, mine)
    mine.save_pretrained(tmp_path)
    mine.load_adapter(tmp_path, "loaded", autocast_adapter_dtype=autocast)
    wanted = torch.float32 if autocast else dtype
    blocks = [p for name, p in mine.named_parameters() if "_block" in name]
    assert {p.dtype for p in blocks} == {wanted}
    assert {p.dtype for n, p in other.named_parameters() if "_block" in n} == {wanted}
    expected = mine(x).detach()
    assert expected.dtype is dtype
    near = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
    close(expected, other(x).detach(), atol=2 * near)
    for safe in (False, True):
        mine.merge_adapter(safe_merge=safe)
        close(mine(x).detach(), expected, atol=2 * near)
        mine.unmerge_adapter()
        close(mine(x).detach(), expected, atol=0)
    close(mine.merge_and_unload()(x).detach(), expected, atol=2 * near)


@pytest.mark.slow
def test_half_precision_from_the_start(tmp_path: Path) -> None:
    dtype = torch.bfloat16
    x = (x_of_net().to(dtype),)
    given = config("MiSS 3")
    for autocast, wanted in ((True, torch.float32), (False, dtype)):
        options: Any = {"autocast_adapter_dtype": autocast, "example_inputs": x}
        made = bone_fx.get_peft_model(net().to(dtype), given, **options)
        made.save_pretrained(tmp_path)
        loaded = bone_fx.PeftModel.from_pretrained(net().to(dtype), tmp_path, **options)
        for module in (made, loaded):
            blocks = [p for name, p in module.named_parameters() if "_block" in name]
            assert {p.dtype for p in blocks} == {wanted}
        made.train()(*x).sum().backward()
        assert {p.grad.dtype for p in made.parameters() if p.grad is not None} == {wanted}


SHARDED = """
import torch
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.fsdp import FullyShardedDataParallel
import bone_fx
from tests.train.peft_models import x_of_net
from tests.train.peft_suite.rows import close, config, moved, ours, output

init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
for row in ("Bone 3", "Bone 5 bat", "MiSS 5", "MiSS 3 bat"):
    mine = ours(config(row))
    moved(mine)
    expected = output(mine)
    wrapped = FullyShardedDataParallel(mine, use_orig_params=True, device_id=torch.device("cpu"))
    with torch.no_grad():
        close(wrapped(x_of_net()), expected)
    again = ours(config(row))
    bone_fx.set_peft_model_state_dict(again, bone_fx.get_peft_model_state_dict(wrapped))
    close(output(again), expected)
destroy_process_group()
"""


@pytest.mark.slow
def test_the_state_under_fsdp() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SHARDED], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@rows()
def test_the_state_of_the_base(row: str) -> None:
    mine = ours(config(row))
    moved(mine)
    before = {name: value.clone() for name, value in base().state_dict().items()}
    state = bone_fx.get_base_model_state_dict(mine)
    assert state.keys() == before.keys()
    close(state, before, atol=0)
    expected = output(mine)
    other = {name: value + 0.1 for name, value in before.items()}
    assert bone_fx.set_base_model_state_dict(mine, other).missing_keys == []
    assert (output(mine) - expected).abs().max() > 1e-2
    bone_fx.set_base_model_state_dict(mine, before)
    close(bone_fx.get_base_model_state_dict(mine), before, atol=0)
    close(output(mine), expected, atol=0)
    for wrong in ({}, {**before, "more": before["lin0.bias"]}, {**before, "lin0.bias": X[0]}):
        with pytest.raises(UsageError):
            bone_fx.set_base_model_state_dict(mine, wrong)
    result = bone_fx.set_base_model_state_dict(mine, {"more": X[0]}, strict=False)
    assert result.unexpected_keys == ["more"]
    assert set(result.missing_keys) == before.keys()
    mine.merge_adapter()
    close(bone_fx.get_base_model_state_dict(mine), before, atol=0)
    with pytest.raises(UsageError, match="merged"):
        bone_fx.set_base_model_state_dict(mine, before)


@pytest.mark.parametrize("kind", ["Bone", "MiSS"])
def test_an_r_above_the_width_is_padded(kind: str) -> None:
    mine, other = pair(config(f"{kind} 2", r=64))
    close(output(mine), output(other))
    close(output(mine.merge_and_unload()), output(other), atol=1e-5)
