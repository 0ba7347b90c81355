"""PEFT's verbs under PEFT's names, compared with PEFT 0.18.1 where it has an answer."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import bone_fx
from bone_fx.errors import AdapterError, UsageError
from tests.train.peft_models import (
    adapted_net,
    in_peft,
    llama,
    net,
    peft_config,
    peft_load,
    stir,
    trains,
    x_of_net,
)

pytestmark = pytest.mark.usefixtures("captures_once")

IDS = {"input_ids": torch.arange(12).view(2, 6)}


def adapted_llama(**fields: Any) -> bone_fx.AdaptedModule:
    config = bone_fx.BoneConfig(**{"r": 2, "target_modules": ["q_proj"], **fields})
    return bone_fx.get_peft_model(llama(), config)


def test_pefts_own_configurations_are_taken() -> None:
    fields = {"r": 2, "target_modules": ["lin0", "lin1"], "task_type": "FEATURE_EXTRACTION"}
    miss = peft.MissConfig(**{**fields, "init_weights": "mini", "mini_r": 2, "miss_dropout": 0.1})
    for config, kind in ((peft_config(**fields), "BONE"), (miss, "MISS")):
        ours = bone_fx.get_peft_model(net(), config, example_inputs=(x_of_net(),))
        assert ours.peft_config["default"].peft_type == kind
        assert (
            ours.get_nb_trainable_parameters()
            == in_peft(net(), copy.deepcopy(config)).get_nb_trainable_parameters()
        )
    assert bone_fx.BoneConfig.of(miss) == bone_fx.MissConfig.of(miss)
    assert bone_fx.BoneConfig.of(miss).mini_r == 2
    kinds = bone_fx.BoneConfig(peft_type=peft.PeftType.MISS, task_type=peft.TaskType.CAUSAL_LM)
    assert (kinds.peft_type, kinds.task_type) == ("MISS", "CAUSAL_LM")
    assert str(kinds.peft_type) == "MISS"
    assert not kinds.is_prompt_learning
    assert bone_fx.MissConfig().to_dict() == {
        name: value.value if name == "peft_type" else value
        for name, value in peft.MissConfig().to_dict().items()
    }


def test_get_peft_model_has_pefts_arguments() -> None:
    ours = bone_fx.get_peft_model(llama(), peft_config(), "mine", False, True, "v1")
    assert ours.active_adapter == "mine"
    assert ours.active_peft_config.revision == "v1"
    with pytest.raises(UsageError):
        bone_fx.get_peft_model(llama(), peft_config(), mixed=True)
    noted = bone_fx.BoneConfig(r=2, base_model_name_or_path="another")
    with pytest.warns(UserWarning, match="another"):
        bone_fx.get_peft_model(llama(), noted)


def test_verbs_take_pefts_keywords(tmp_path: Path) -> None:
    ours = adapted_net()
    ours.save_pretrained(
        tmp_path,
        safe_serialization=True,
        selected_adapters=["default"],
        save_embedding_layers="auto",
        is_main_process=True,
        save_function=torch.save,
    )
    ours.add_adapter(
        adapter_name="other",
        peft_config=peft_config(target_modules=["lin1"]),
        low_cpu_mem_usage=False,
    )
    result = ours.load_adapter(
        model_id=tmp_path, adapter_name="q", is_trainable=True, torch_device="cpu", revision=None
    )
    assert result.missing_keys == []
    ours.set_adapter(adapter_name="q", inference_mode=True)
    assert trains(ours) == set()
    ours.merge_adapter(adapter_names=["q"], safe_merge=True)
    assert ours.merged_adapters == ["q"]
    ours.merge_and_unload(progressbar=True, safe_merge=True, adapter_names=["q"])
    with pytest.raises(UsageError, match="key_mapping"):
        ours.load_adapter(tmp_path, "r", key_mapping={"a": "b"})


def test_a_pickle_is_written_for_peft(tmp_path: Path) -> None:
    ours = adapted_net().eval()
    stir(ours)
    ours.save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path, safe_serialization=False)
    theirs = peft_load(net(), tmp_path).eval()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    torch.testing.assert_close(theirs(x_of_net()), ours(x_of_net()))
    with pytest.raises(AdapterError, match="safe_serialization"):
        ours.load_adapter(tmp_path, "again")


def test_a_state_dict_is_saved_in_place_of_the_values(tmp_path: Path) -> None:
    ours, other = adapted_net(modules_to_save=["lin1"]), adapted_net(modules_to_save=["lin1"])
    stir(other)
    with torch.no_grad():
        other.get_parameter("lin1.weight").add_(1)
    ours.save_pretrained(tmp_path, state_dict=other.state_dict())
    ours.load_adapter(tmp_path, "default")
    assert torch.equal(ours.eval()(x_of_net()), other.eval()(x_of_net()))


def test_status_is_pefts() -> None:
    fields = {"target_modules": ["lin0", "lin1"], "modules_to_save": ["prenorm"]}
    theirs, ours = in_peft(net(), **fields), adapted_net(**fields)
    for module in (theirs, ours):
        module.add_adapter("two", peft_config(**{**fields, "target_modules": ["lin1"]}))
    for change in ("", "merge_adapter", "disable_adapter_layers"):
        for module in (theirs, ours):
            getattr(module, change)() if change else None
        expected = [
            {**asdict(s), "merged_adapters": s.merged_adapters} for s in theirs.get_layer_status()
        ]
        actual = [asdict(s) for s in ours.get_layer_status()]
        assert [s["name"] for s in actual] == [s["name"] for s in expected]
        same = ("module_type", "enabled", "requires_grad", "available_adapters", "devices")
        for one, other in zip(actual, expected, strict=True):
            assert {key: one[key] for key in same} == {key: other[key] for key in same}
        status, other_status = asdict(ours.get_model_status()), asdict(theirs.get_model_status())
        if change == "disable_adapter_layers":  # PEFT lets the base's own module train then
            status.pop("trainable_params"), other_status.pop("trainable_params")
        if change:  # PEFT: "irregular", as its wrapped modules are never merged
            status.pop("merged_adapters"), other_status.pop("merged_adapters")
        assert status == other_status
    assert ours.targeted_module_names == ["lin0", "lin1"]


def test_set_requires_grad_is_pefts() -> None:
    theirs, ours = in_peft(net(), target_modules=["lin0"]), adapted_net()
    for module in (theirs, ours):
        module.add_adapter("two", peft_config(target_modules=["lin0", "lin1"]))
        module.set_requires_grad("two")
    assert trains(ours) == trains(theirs)
    for module in (theirs, ours):
        module.set_requires_grad(adapter_names=["default", "two"], requires_grad=False)
    assert trains(ours) == trains(theirs) == set()


def test_unloading_gives_the_model_without_blocks() -> None:
    model = net().eval()
    config = bone_fx.BoneConfig(r=2, target_modules=["lin0"], modules_to_save=["lin1"])
    ours = bone_fx.adapt(model, config, (x_of_net(),))
    stir(ours)
    x = x_of_net()
    assert torch.equal(ours.unload()(x), model(x))
    assert ours.get_base_model() is model
    assert ours.base_model.model is model
    with torch.no_grad():
        ours.get_parameter("lin1.bias").add_(1)
    assert type(ours.unload()) is type(model)
    torch.testing.assert_close(ours.unload()(x), model(x) + 1)


def test_the_state_of_an_adapter_travels_in_memory() -> None:
    source, target = adapted_net(modules_to_save=["lin1"]), adapted_net(modules_to_save=["lin1"])
    stir(source)
    theirs = in_peft(net(), target_modules=["lin0"], modules_to_save=["lin1"])
    state = bone_fx.get_peft_model_state_dict(source)
    assert state.keys() == peft.get_peft_model_state_dict(theirs).keys()
    blocks = {n: p for n, p in target.named_parameters() if p.requires_grad}
    graph = target.graph
    bone_fx.set_peft_model_state_dict(target, state)
    assert target.graph is graph
    assert all(target.get_parameter(name) is p for name, p in blocks.items())
    assert torch.equal(target.eval()(x_of_net()), source.eval()(x_of_net()))
    peft.set_peft_model_state_dict(theirs, state)
    torch.testing.assert_close(theirs.eval()(x_of_net()), source(x_of_net()))
    key = next(key for key in state if key.endswith("bone_block"))
    for wrong in (
        {},
        {key: state[key][:1]},
        {**state, "base_model.model.x.bone_block": state[key]},
    ):
        with pytest.raises(AdapterError):
            target.set_adapter_state(wrong)


def test_one_adapter_among_several_is_swapped_without_a_rebuild(tmp_path: Path) -> None:
    other = adapted_net()
    stir(other)
    other.save_pretrained(tmp_path)
    ours = adapted_net("a")
    ours.add_adapter("b", bone_fx.BoneConfig(r=2, target_modules=["lin0", "lin1"]))
    stir(ours, "b")
    ours.set_adapter(["a", "b"])
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    graph, kept = ours.graph, ours.get_parameter("lin1.bone_block.b").clone()
    bone_fx.hotswap_adapter(ours, tmp_path, "a")
    assert ours.graph is graph
    assert torch.equal(
        ours.get_parameter("lin0.bone_block.a"), other.get_parameter("lin0.bone_block.default")
    )
    assert torch.equal(ours.get_parameter("lin1.bone_block.b"), kept)
    ours(x_of_net()).sum().backward()
    optimizer.step()
    assert not torch.equal(
        ours.get_parameter("lin0.bone_block.a"), other.get_parameter("lin0.bone_block.default")
    )
    with pytest.raises(AdapterError, match="does not fit"):
        bone_fx.hotswap_adapter(ours, tmp_path, "b")
    adapted_net(init_weights="bat").save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="the method bone"):
        bone_fx.hotswap_adapter(ours, tmp_path, "a")


def test_a_weighted_adapter_is_the_sum_of_its_parts() -> None:
    ours = adapted_net("a").eval()
    ours.add_adapter("b", bone_fx.BoneConfig(r=2, target_modules=["lin0", "lin1"]))
    stir(ours, "a")
    stir(ours, "b")
    ours.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum")
    for site in ("lin0", "lin1"):
        parts = [0.5 * ours.get_delta_weight(site, "a")] if site == "lin0" else []
        expected = sum([*parts, -2.0 * ours.get_delta_weight(site, "b")])
        torch.testing.assert_close(ours.get_delta_weight(site, "sum"), expected)
    ours.set_adapter("sum")
    torch.testing.assert_close(ours.fold()(x_of_net()), ours(x_of_net()), rtol=0, atol=1e-5)
    ours.add_adapter("bat", bone_fx.BoneConfig(r=2, target_modules=["lin0"], init_weights="bat"))
    ours.add_adapter("r4", bone_fx.BoneConfig(r=4, target_modules=["lin0"]))
    for names, kind in (
        (["a", "bat"], "linear"),
        (["a", "r4"], "linear"),
        (["a"], "svd"),
        ([], "linear"),
    ):
        with pytest.raises(UsageError):
            ours.add_weighted_adapter(names, [1.0] * len(names), "wrong", kind)


def test_what_the_model_knows_passes_through() -> None:
    ours = adapted_llama(modules_to_save=["embed_tokens"])
    model: Any = ours.get_base_model()
    assert ours.device == torch.device("cpu")
    assert ours.dtype is torch.float32
    assert ours.config is model.config
    assert ours.generation_config is model.generation_config
    ours.add_model_tags(["mine"])
    assert ours.model_tags == ["mine"]
    assert ours.num_parameters(only_trainable=True) == ours.get_nb_trainable_parameters()[0]
    table = ours.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    assert table.weight is ours.get_parameter("model.embed_tokens.weight")
    assert table.weight is not model.model.embed_tokens.weight
    assert ours.get_output_embeddings()(torch.ones(1, 32)).shape == (1, 64)
    assert ours.enable_input_require_grads() is None
    for name in ("resize_token_embeddings", "tie_weights", "nonsense"):
        assert not hasattr(ours, name)
    with pytest.raises(AttributeError, match="before adapt"):
        _ = ours.resize_token_embeddings
    assert ours.bfloat16 is not None


def test_a_method_that_would_run_the_model_without_adapters_does_not_pass() -> None:
    model = net()
    model.encode = lambda x: model.lin0(x)  # type: ignore[assignment]
    model.labels = ["a", "b"]  # type: ignore[assignment]
    ours = bone_fx.adapt(model, bone_fx.BoneConfig(r=2, target_modules=["lin0"]), (x_of_net(),))
    assert ours.labels == ["a", "b"]
    with pytest.raises(AttributeError, match="without the adapters"):
        ours.encode(x_of_net())
    with pytest.raises(AttributeError):
        _ = ours.drop


def test_pefts_auto_classes_open_what_is_saved(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    for task, auto in ((None, peft.AutoPeftModel), ("CAUSAL_LM", peft.AutoPeftModelForCausalLM)):
        config = bone_fx.BoneConfig(r=2, target_modules=["q_proj"], task_type=task)
        ours = bone_fx.get_peft_model(base, config).eval()
        stir(ours)
        folder = tmp_path / str(task)
        ours.save_pretrained(folder)
        written = json.loads((folder / "adapter_config.json").read_text())
        assert written["peft_version"] == peft.__version__
        assert (written["auto_mapping"] is None) is (task is not None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = auto.from_pretrained(folder).eval()
        torch.testing.assert_close(theirs(**IDS).logits, ours(**IDS).logits)


def test_saved_embeddings_are_those_that_were_asked_for(tmp_path: Path) -> None:
    ours = adapted_llama()
    for choice in (True, False, "auto"):
        theirs = in_peft(llama(), target_modules=["q_proj"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=choice)
        ours.save_pretrained(tmp_path / "ours", save_embedding_layers=choice)
        keys = [
            peft.load_peft_weights(str(tmp_path / name), device="cpu").keys()
            for name in ("ours", "theirs")
        ]
        assert keys[0] == keys[1]


def test_a_model_card_lies_beside_the_adapter_and_keeps_a_persons_text(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    fields = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    ours, theirs = (
        bone_fx.get_peft_model(base, bone_fx.BoneConfig(**fields)),
        in_peft(base, **fields),
    )
    heads = []
    for name, module in (("ours", ours), ("theirs", theirs)):
        module.save_pretrained(tmp_path / name)
        heads.append((tmp_path / name / "README.md").read_text().split("---")[1])
    assert heads[0] == heads[1]
    text = (tmp_path / "ours" / "README.md").read_text()
    assert "Bone adapter" in text
    assert text.count(f"- bone_fx {bone_fx.__version__}") == 1
    ours.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / "README.md").read_text() == text
    (tmp_path / "ours" / "README.md").write_text("---\nmeta: hello\ntags:\n- own\n---\nMy words.\n")
    ours.create_or_update_model_card(tmp_path / "ours")
    text = (tmp_path / "ours" / "README.md").read_text()
    assert {"meta: hello", "My words.", "library_name: peft", "- own"} <= set(text.splitlines())


def test_other_adapters_lie_in_folders_of_their_names_under_one_card(tmp_path: Path) -> None:
    ours = adapted_net("mine")
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").exists()
    assert (tmp_path / "mine" / "adapter_config.json").exists()
    loaded = bone_fx.PeftModel.from_pretrained(
        net(), tmp_path, subfolder="mine", example_inputs=(x_of_net(),)
    )
    assert loaded.active_adapter == "default"
    given = bone_fx.AdaptedModule.from_pretrained(
        net(),
        tmp_path,
        adapter_name="mine",
        config=peft_config(target_modules="lin0"),
        example_inputs=(x_of_net(),),
    )
    assert given.peft_config["mine"].target_modules == "lin0"


@pytest.mark.parametrize(
    "call",
    [
        lambda: bone_fx.get_peft_model("tiny", bone_fx.BoneConfig(r=8)),  # type: ignore[arg-type]
        lambda: bone_fx.AdaptedModule.from_pretrained("adapter", net()),  # type: ignore[arg-type]
    ],
    ids=["a name", "the other way round"],
)
def test_what_is_no_model_is_said(call: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match="a model is needed"):
        call()
