"""What PEFT's configurations and verbs mean, compared with PEFT 0.18.1 itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft.utils.constants
import pytest
import torch

import bone_fx
from bone_fx.default_targets import DEFAULT_TARGETS
from bone_fx.errors import ConfigError, FoldError, SiteError, UsageError
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


@pytest.mark.parametrize("entry", ["norm", "prenorm", "lin1", "1"])
def test_modules_to_save_are_ends_of_names(entry: str, tmp_path: Path) -> None:
    theirs = in_peft(net(), target_modules=["lin0"], modules_to_save=[entry])
    ours = adapted_net(modules_to_save=[entry])
    assert trains(ours) == trains(theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    theirs.save_pretrained(tmp_path)
    again = bone_fx.adapt(net(), tmp_path, (x_of_net(),))
    assert trains(again) == trains(theirs)


def test_modules_to_save_that_end_an_adapted_layers_name_are_refused() -> None:
    with pytest.raises(TypeError):
        in_peft(net(), target_modules=["lin0"], modules_to_save=["in0"])
    with pytest.raises(SiteError, match="lin0"):
        adapted_net(modules_to_save=["in0"])


def test_a_list_of_modules_cannot_be_trained_whole() -> None:
    with pytest.raises(TypeError):
        in_peft(llama(), target_modules=["lm_head"], modules_to_save=["layers"])
    config = bone_fx.BoneConfig(r=2, target_modules=["lm_head"], modules_to_save=["layers"])
    with pytest.raises(SiteError, match="list of modules"):
        bone_fx.adapt(llama(), config)


def test_deleting_the_active_adapter_activates_another() -> None:
    ours = adapted_net("b")
    theirs = in_peft(net(), target_modules=["lin0"], adapter_name="b")
    for name in ("c", "a"):
        ours.add_adapter(name, bone_fx.BoneConfig(r=2, target_modules=["lin0"]))
        theirs.add_adapter(name, peft_config(target_modules=["lin0"]))
    stir(ours, "a")
    with pytest.warns(UserWarning, match="'a' is active"):
        ours.delete_adapter("b")
    with pytest.warns(UserWarning, match="Setting active adapter"):
        theirs.delete_adapter("b")
    assert ours.active_adapters == theirs.active_adapters == ["a"]
    assert trains(ours) == trains(theirs) == {"lin0.bone_block.a"}
    assert not torch.equal(ours.eval()(x_of_net()), net().eval()(x_of_net()))
    ours.delete_adapter("c")
    ours.delete_adapter("a")
    assert ours.active_adapters == []


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_loaded_adapter_is_frozen_unless_it_is_trainable(
    is_trainable: bool, tmp_path: Path
) -> None:
    in_peft(net(), target_modules=["lin0"], modules_to_save=["lin1"]).save_pretrained(tmp_path)
    theirs = peft_load(net(), tmp_path, is_trainable=is_trainable)
    x = (x_of_net(),)
    ours = bone_fx.AdaptedModule.from_pretrained(
        net(), tmp_path, is_trainable=is_trainable, example_inputs=x
    )
    assert trains(ours) == trains(theirs)
    assert ours.training is theirs.training
    assert ours.peft_config["default"].inference_mode is not is_trainable
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Bone will be removed")
        for module in (ours, theirs):
            module.load_adapter(tmp_path, "other", is_trainable=is_trainable)
    assert trains(ours) == trains(theirs)
    assert ours.training is theirs.training
    ours.set_adapter("other")
    assert {name.rpartition(".")[2] for name in trains(ours) if "block" in name} == {"other"}
    by_adapt = bone_fx.adapt(net(), tmp_path, x, is_trainable=is_trainable)
    assert (trains(by_adapt), by_adapt.training) == (trains(theirs), theirs.training)


def test_loading_for_inference_leaves_what_trains() -> None:
    """PEFT's own tests call it a fault that the active adapter is frozen too."""
    ours = adapted_net(inference_mode=True)
    ours.set_requires_grad("default")
    ours.eval()
    assert trains(ours) == {"lin0.bone_block.default"}


def test_inference_mode_of_a_configuration_freezes() -> None:
    theirs = in_peft(net(), target_modules=["lin0"], inference_mode=True)
    config = bone_fx.BoneConfig(r=2, target_modules=["lin0"], inference_mode=True)
    assert trains(bone_fx.adapt(net(), config, (x_of_net(),))) == trains(theirs) == set()


def test_loading_under_a_name_that_is_there_takes_the_values(tmp_path: Path) -> None:
    source, target = adapted_net(), adapted_net()
    stir(source)
    source.save_pretrained(tmp_path)
    block = target.get_parameter("lin0.bone_block.default")
    target.load_adapter(tmp_path, "default", is_trainable=True)
    assert target.get_parameter("lin0.bone_block.default") is block
    assert torch.equal(block, source.get_parameter("lin0.bone_block.default"))


def test_embeddings_that_were_saved_on_their_own_stay_frozen(tmp_path: Path) -> None:
    theirs = in_peft(llama(), target_modules=["q_proj"])
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.weight.mul_(2)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = peft_load(llama(), tmp_path, is_trainable=True).eval()
    ours = bone_fx.adapt(llama(), tmp_path).eval()
    assert trains(ours) == trains(loaded)
    ids = {"input_ids": torch.arange(12).view(2, 6)}
    torch.testing.assert_close(ours(**ids).logits, loaded(**ids).logits)
    ours.set_requires_grad("default")
    assert trains(ours) == trains(loaded)
    ours.save_pretrained(tmp_path / "again")
    loaded = peft_load(llama(), tmp_path / "again").eval()
    torch.testing.assert_close(ours(**ids).logits, loaded(**ids).logits)


def test_two_active_adapters_cannot_train_one_module_whole() -> None:
    ours = adapted_net("one", modules_to_save=["lin1"])
    theirs = in_peft(net(), target_modules=["lin0"], modules_to_save=["lin1"], adapter_name="one")
    for name, entry in (("two", "lin1"), ("three", "norm")):
        ours.add_adapter(
            name, bone_fx.BoneConfig(r=2, target_modules=["lin0"], modules_to_save=[entry])
        )
        theirs.add_adapter(name, peft_config(target_modules=["lin0"], modules_to_save=[entry]))
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="one"):
            module.base_model.set_adapter(["one", "two"])
        module.base_model.set_adapter(["one", "three"])
    for verb in (ours.fold, ours.merge_adapter):
        with pytest.raises(UsageError, match="lin1"):
            verb(["one", "two"])


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("unused", "does not reach"),
        ("norm", "LayerNorm is not a linear layer"),
        ("nothing", "matched no linear layer"),
        ("drop", "Dropout is not a linear layer"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_a_warning(target: str, reason: str) -> None:
    with pytest.warns(UserWarning, match=f"{target}.*{reason}"):
        ours = adapted_net(target_modules=["lin0", target])
    assert ours.targeted_module_names == ["lin0"]


def test_all_linear_names_what_forward_does_not_reach() -> None:
    with pytest.warns(UserWarning, match="unused"):
        ours = adapted_net(target_modules="all-linear")
    assert ours.targeted_module_names == ["lin0", "lin1"]


def test_excluding_nothing_is_a_warning() -> None:
    fields = peft_config(target_modules=["lin0"], exclude_modules=["nope"])
    with pytest.warns(UserWarning, match="no modules were excluded"):
        theirs = peft.get_peft_model(net(), fields)
    with pytest.warns(UserWarning, match="excluded nothing"):
        ours = adapted_net(exclude_modules=["nope"])
    assert ours.targeted_module_names == theirs.targeted_module_names
    adapted_net(target_modules=["lin0", "lin1"], exclude_modules=["lin1"])


def test_default_targets_are_pefts() -> None:
    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_BONE_TARGET_MODULES_MAPPING
    assert table == peft.utils.constants.TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING
    assert table == DEFAULT_TARGETS


def test_targets_that_are_not_named_are_those_of_the_model_type() -> None:
    theirs = in_peft(llama())
    ours = bone_fx.get_peft_model(llama(), bone_fx.BoneConfig(r=2))
    assert ours.targeted_module_names == theirs.targeted_module_names
    assert set(ours.peft_config["default"].target_modules or ()) == {"q_proj", "v_proj"}
    with pytest.raises(SiteError, match="target_modules is not set"):
        adapted_net(target_modules=None)


def test_a_task_type_that_peft_does_not_know_is_refused() -> None:
    for config in (peft_config, bone_fx.BoneConfig):
        with pytest.raises(ValueError, match="IMAGE_CLS"):
            config(task_type="IMAGE_CLS")


def test_what_a_person_gave_wrongly_is_a_value_error() -> None:
    ours = adapted_net()
    for wrong in (
        lambda: ours.delete_adapter("x"),
        lambda: ours.set_adapter("x"),
        lambda: ours.set_requires_grad("x"),
        lambda: ours.add_adapter("y", bone_fx.BoneConfig(r=2, target_modules=["nope"])),
        lambda: ours.save_pretrained("out", selected_adapters=["x"]),
        lambda: ours.save_pretrained(__file__),
        lambda: ours.load_adapter("./no such folder", "z"),
        lambda: bone_fx.get_peft_model(net(), bone_fx.BoneConfig(target_modules=["lin0"])),
        lambda: bone_fx.BoneConfig.of("lin0"),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            wrong()
    with torch.no_grad():
        ours.get_parameter("lin0.bone_block.default")[0] = torch.nan
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(ValueError, match="lin0") as raised:
            merge(safe_merge=True)
        assert isinstance(raised.value, FoldError)
    with pytest.raises(ConfigError):
        bone_fx.BoneConfig.of(peft.LoraConfig())


@pytest.mark.parametrize("init_weights", [False, "bat"])
def test_under_autocast_results_have_the_dtype_of_what_goes_in(init_weights: Any) -> None:
    fields = {"target_modules": ["lin0", "lin1"], "init_weights": init_weights}
    theirs, ours = in_peft(net(), **fields).eval(), adapted_net(**fields).eval()
    stir(ours)
    with torch.no_grad():
        for name in ("lin0", "lin1"):
            block = getattr(theirs.base_model.model, name).bone_block["default"]
            block.copy_(ours.get_parameter(f"{name}.bone_block.default"))
    exact = ours(x_of_net()).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = ours(x_of_net()).detach(), theirs(x_of_net()).detach()
    assert actual.dtype == expected.dtype == torch.float32
    error = float((actual - exact).abs().max())
    assert error <= max(2e-2, float((expected - exact).abs().max()))  # PEFT folds in bfloat16


def test_merged_models_train_what_pefts_train() -> None:
    fields = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
    theirs, ours = in_peft(net(), **fields), adapted_net(**fields)
    for verb in ("merge_and_unload", "unload"):
        assert trains(getattr(ours, verb)()) == trains(getattr(theirs, verb)())
        theirs = in_peft(net(), **fields)
    ours.merge_adapter()
    theirs.merge_adapter()
    assert trains(ours) == trains(theirs)


def test_merging_again_and_switching_while_merged_are_warnings() -> None:
    ours = adapted_net("one")
    ours.add_adapter("two", bone_fx.BoneConfig(r=4, target_modules=["lin0"]))
    stir(ours, "one")
    stir(ours, "two")
    weight = ours.get_parameter("lin0.weight").clone()
    with pytest.warns(UserWarning, match="no adapter is merged"):
        ours.unmerge_adapter()
    ours.merge_adapter()
    one = ours.get_parameter("lin0.weight").clone()
    with pytest.warns(UserWarning, match="merged already"):
        ours.merge_adapter()
    assert torch.equal(ours.get_parameter("lin0.weight"), one)
    with pytest.warns(UserWarning, match="join them"):
        ours.merge_adapter(["two"])
    both = weight + ours.get_delta_weight("lin0", "one") + ours.get_delta_weight("lin0", "two")
    torch.testing.assert_close(ours.get_parameter("lin0.weight"), both, rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="are no more"):
        ours.set_adapter("two")
    assert torch.equal(ours.get_parameter("lin0.weight"), weight)


def test_a_hook_that_could_not_fire_is_refused() -> None:
    ours = adapted_net()
    part = ours.get_submodule("lin0")
    for verb in ("forward_hook", "forward_pre_hook", "full_backward_hook"):
        with pytest.raises(UsageError, match="layer_modules"):
            getattr(part, f"register_{verb}")(lambda *_: None)
    seen: list[Any] = []
    ours.register_forward_hook(lambda *values: seen.append(values[2]))
    result = ours(x_of_net())
    assert seen == [result]


def test_a_hook_on_a_layer_fires_and_on_its_parts_is_refused() -> None:
    ours = bone_fx.get_peft_model(llama(), bone_fx.BoneConfig(r=2))
    seen: list[Any] = []
    for layer in ours.layer_modules():
        layer.register_forward_hook(lambda *values: seen.append(values[2]))
    ours(input_ids=torch.arange(12).view(2, 6))
    assert len(seen) == 2
    with pytest.raises(UsageError, match="never fire"):
        ours.get_input_embeddings().register_forward_hook(lambda *_: None)


def test_nothing_trains_while_adapters_are_off() -> None:
    ours = adapted_net("one")
    ours.add_adapter("two", bone_fx.BoneConfig(r=2, target_modules=["lin0"]))
    assert trains(ours) == {"lin0.bone_block.one"}
    with ours.disable_adapter():
        assert trains(ours) == set()
    assert trains(ours) == {"lin0.bone_block.one"}
    ours.disable_adapter_layers()
    with ours.disable_adapter():
        pass
    assert not ours.get_model_status().enabled
    ours.set_adapter("two")
    assert trains(ours) == set()
    ours.enable_adapter_layers()
    assert trains(ours) == {"lin0.bone_block.two"}
