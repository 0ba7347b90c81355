"""Several adapters, and what of them trains: PEFT's tests of both, beside PEFT 0.18.1."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bone_fx
from bone_fx.errors import UsageError
from tests.train.peft_models import in_peft, peft_load
from tests.train.peft_suite.rows import base, close, config, give, moved, ours, output, training

ACTIVE = {
    f"{kind} {name}": (
        config(f"{kind} 2", init_weights=False),
        config(f"{kind} 2", init_weights=False, target_modules=[target]),
    )
    for kind in ("Bone", "MiSS")
    for name, target in (("Same", "lin0"), ("Different", "lin1"))
}
"""PEFT's `MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES`."""


class Block(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(12, 12)
        self.lin1 = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lin1(self.lin0(x).relu())


class Deep(nn.Module):
    """Three blocks, so that targets can overlap partly."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.out(x)
        return result


def deep() -> Deep:
    torch.manual_seed(0)
    return Deep()


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


@functools.cache
def _captured(kind: str) -> bone_fx.AdaptedModule:
    return bone_fx.adapt(deep(), config(f"{kind} 2", target_modules=["out"]), (X,))


def on_deep(kind: str, **fields: Any) -> bone_fx.AdaptedModule:
    """The deep net under one adapter."""
    mine = copy.deepcopy(_captured(kind))
    mine.add_adapter("mine", config(f"{kind} 2", **fields))
    mine.set_adapter("mine")
    mine.delete_adapter("default")
    return mine


def both(kind: str, **fields: Any) -> tuple[bone_fx.AdaptedModule, Any]:
    """The deep net under one adapter, here and under PEFT."""
    other = in_peft(deep(), config(f"{kind} 2", **fields), adapter_name="mine")
    return on_deep(kind, **fields), other


kinds = pytest.mark.parametrize("kind", ["Bone", pytest.param("MiSS", marks=pytest.mark.slow)])
cases = pytest.mark.parametrize("case", ACTIVE)


def two(case: str) -> tuple[bone_fx.AdaptedModule, Any]:
    """Two adapters on the small net, with the same values here and under PEFT."""
    first, second = ACTIVE[case]
    mine = ours(first, "one")
    mine.add_adapter("other", second)
    other = in_peft(base(), copy.deepcopy(first), adapter_name="one")
    other.add_adapter("other", copy.deepcopy(second))
    for name in ("one", "other"):
        moved(mine, name)
        give(other, mine, name)
    return mine, other


@cases
def test_two_active_adapters(case: str) -> None:
    mine, other = two(case)
    outputs = []
    for names in ("one", "other", ["one", "other"]):
        for module in (mine, other):
            module.base_model.set_adapter(names)
        outputs.append(output(mine))
        close(outputs[-1], output(other))
    mine.merge_adapter()
    close(output(mine), outputs[2], atol=1e-5)
    mine.unmerge_adapter()
    close(output(mine), outputs[2], atol=0)
    with mine.disable_adapter():
        close(output(mine), output(base()), atol=0)
    assert all((outputs[i] - outputs[j]).abs().max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))


@cases
def test_merging_some_of_them(case: str) -> None:
    mine, other = two(case)
    outputs = {}
    for name in ("one", "other"):
        mine.set_adapter(name)
        outputs[name] = output(mine)
    mine.set_adapter("one")
    close(output(mine), outputs["one"], atol=0)
    for name in outputs:
        close(output(mine.merge_and_unload(adapter_names=[name])), outputs[name], atol=1e-5)
    merged = output(mine.merge_and_unload(adapter_names=["other", "one"]))
    close(merged, output(other.merge_and_unload(adapter_names=["other", "one"])), atol=1e-5)
    assert all((merged - single).abs().max() > 1e-3 for single in outputs.values())


@cases
def test_merging_one_after_the_other(case: str) -> None:
    mine, _ = two(case)
    twin = copy.deepcopy(mine)
    mine.merge_adapter(["one", "other"])
    twin.merge_adapter(["one"])
    with pytest.warns(UserWarning, match="join them"):
        twin.merge_adapter(["other"])
    close(output(twin), output(mine), atol=1e-6)
    twin.unmerge_adapter()
    with twin.disable_adapter():
        close(output(twin), output(base()), atol=0)


@kinds
def test_active_adapters_where_targets_overlap_partly(kind: str) -> None:
    fields: list[dict[str, Any]] = [
        {"target_modules": ["layers.0.lin0", "layers.1.lin0"]},
        {"target_modules": ["layers.1.lin0", "layers.2.lin0"], "modules_to_save": ["0.lin1"]},
    ]
    mine, other = both(kind, **fields[0])
    for module in (mine, other):
        module.add_adapter("other", config(f"{kind} 2", **fields[1]))
    for names in ("mine", "other", "mine", ["other"], ["mine"]):
        for module in (mine, other):
            module.base_model.set_adapter(names)
        assert mine.active_adapters == other.active_adapters
        assert training(mine, "other") == training(other, "other")
        active = [{s.name: s.active_adapters for s in m.get_layer_status()} for m in (mine, other)]
        assert active[0] == active[1]


@kinds
def test_active_adapters_that_train_one_module_whole_are_refused(kind: str) -> None:
    first = {"target_modules": ["layers.0.lin0"], "modules_to_save": ["0.lin1", "1.lin1"]}
    mine, other = both(kind, **first)
    entries = {"same": ["0.lin1"], "overlapping": ["2.lin1", "1.lin1"], "apart": ["2.lin1"]}
    for name, entry in entries.items():
        for module in (mine, other):
            module.add_adapter(name, config(f"{kind} 2", **{**first, "modules_to_save": entry}))
    for module in (mine, other):
        for name in ("same", "overlapping"):
            with pytest.raises(ValueError, match="mine"):
                module.base_model.set_adapter(["mine", name])
        module.base_model.set_adapter(["mine", "apart"])
    assert mine.active_adapters == ["mine", "apart"]


@pytest.mark.parametrize("kind", ["Bone", "MiSS"])
@pytest.mark.parametrize("first", [True, False])
def test_one_adapter_trains_a_module_whole_and_the_other_does_not(kind: str, first: bool) -> None:
    whole, plain = config(f"{kind} 5", init_weights=False), config(f"{kind} 2", init_weights=False)
    mine = ours(whole if first else plain)
    mine.add_adapter("other", plain if first else whole)
    for name in ("default", "other"):
        mine.set_adapter(name)
        assert torch.isfinite(output(mine)).all()
        assert ("lin1.weight" in training(mine, "other")) is (first == (name == "default"))


@pytest.mark.parametrize("kind", ["Bone", "MiSS"])
@pytest.mark.parametrize("target", ["lin0", "lin1"])
def test_what_requires_gradients(kind: str, target: str) -> None:
    given = [config(f"{kind} 2"), config(f"{kind} 2", target_modules=[target])]
    mine = ours(given[0])
    other = in_peft(base(), copy.deepcopy(given[0]))
    seen: list[list[set[str]]] = [[], []]
    for module, noted in zip((mine, other), seen, strict=True):
        module.add_adapter("adapter1", copy.deepcopy(given[1]))
        noted.append(training(module))
        for name in ("default", "adapter1"):
            module.set_adapter(name)
            noted.append(training(module))
            with module.disable_adapter():
                noted.append(training(module))
        noted.append(training(module))
    assert seen[0] == seen[1]
    assert seen[0][-1] == {f"{target}.bone_block.adapter1"}


@kinds
def test_gradients_by_hand(kind: str) -> None:
    mine, other = both(kind, target_modules=["layers.0.lin0"])
    more = {
        "target_modules": ["layers.0.lin0", "layers.1.lin0"],
        "modules_to_save": ["layers.2.lin0"],
    }
    seen: list[list[set[str]]] = [[], []]
    for module, noted in zip((mine, other), seen, strict=True):
        noted.append(training(module, "adapter1"))
        module.add_adapter("adapter1", config(f"{kind} 2", **more))
        noted.append(training(module, "adapter1"))
        module.set_requires_grad(adapter_names="adapter1")
        noted.append(training(module, "adapter1"))
        module.set_requires_grad(adapter_names=["mine", "adapter1"], requires_grad=False)
        noted.append(training(module, "adapter1"))
    # Weights and biases that wait under `modules_to_save` are no parameters of the graph yet.
    assert [{n for n in names if "block" in n} for names in seen[0]] == [
        {n for n in names if "block" in n} for names in seen[1]
    ]
    assert seen[0][-1] == set()


@kinds
@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("whole", [pytest.param(None, marks=pytest.mark.slow), ["layers.0.lin1"]])
def test_what_trains_of_what_is_loaded(
    kind: str, is_trainable: bool, whole: Any, tmp_path: Path
) -> None:
    fields = {"target_modules": ["layers.0.lin0"], "modules_to_save": whole}
    on_deep(kind, **fields).save_pretrained(tmp_path)
    other = peft_load(deep(), tmp_path / "mine", is_trainable=is_trainable)
    mine = bone_fx.PeftModel.from_pretrained(
        deep(), tmp_path / "mine", is_trainable=is_trainable, example_inputs=(X,)
    )
    for name in (None, "other"):
        if name:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Bone will be removed")
                for module in (mine, other):
                    module.load_adapter(tmp_path / "mine", name, is_trainable=is_trainable)
        assert training(mine) == training(other)
        assert bool(training(mine)) is is_trainable


def test_two_adapters_of_one_name_are_refused() -> None:
    mine = ours(config("Bone 2"))
    before = bone_fx.get_peft_model_state_dict(mine)
    with pytest.raises(UsageError, match="default"):
        mine.add_adapter("default", config("Bone 3"))
    assert mine.peft_config["default"].target_modules == ["lin0"]
    close(bone_fx.get_peft_model_state_dict(mine), before, atol=0)
