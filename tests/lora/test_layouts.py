"""Layouts of trainers that use PEFT: the same adapter under other names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import bone_fx
from bone_fx.adapter_folder import read_adapter
from bone_fx.adapters import LowRank
from bone_fx.deploy.trained.sites import with_parameters
from bone_fx.errors import AdapterError
from bone_fx.lora.keys import plain
from bone_fx.sites import matches_end
from bone_fx.verify.unmerged.peft_layout import PeftAdapter
from tests.lora.folders import PREFIX, UP, Q, pairs, under_prefix, write
from tests.lora.peft_cases import llama, mixtral

Rename = Callable[[str], str]
LAYOUTS: dict[str, Rename] = {
    "PEFT": lambda name: PREFIX + name,
    "without a prefix": lambda name: name,
    "with the prefix twice": lambda name: PREFIX + PREFIX + name,
    "DDP and DeepSpeed": lambda name: f"module.{PREFIX}{name}",
    "torch.compile": lambda name: f"_orig_mod.{PREFIX}{name}",
    "compiled layers": lambda name: PREFIX + name.replace(".mlp", "._orig_mod.mlp"),
    "FSDP": lambda name: PREFIX + name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "checkpointed activations": lambda name: (
        PREFIX + name.replace("layers.1.", "layers.1._checkpoint_wrapped_module.")
    ),
    "the adapter's name before the end": lambda name: (
        PREFIX + name.replace(".weight", ".default.weight")
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_readers_find_the_same_adapter(layout: str, tmp_path: Path) -> None:
    tensors = pairs()
    renamed = {LAYOUTS[layout](name): tensor for name, tensor in tensors.items()}
    folder = write(tmp_path / "adapter", renamed, rank_pattern={"up_proj": 4}, lora_alpha=10)
    adapter = read_adapter(folder)
    again = PeftAdapter.read(folder, model=llama())
    assert adapter.unused == ()
    assert set(adapter.blocks) == set(again.blocks) == {UP, Q}
    for blocks in (adapter.blocks, again.blocks):
        for site, block in blocks.items():
            assert isinstance(block, LowRank)
            assert torch.equal(block.a, tensors[f"{site}.lora_A.weight"])
            assert torch.equal(block.b, tensors[f"{site}.lora_B.weight"])
            assert block.scale == 2.5


def test_halves_and_floats_mixed_are_floats(tmp_path: Path) -> None:
    tensors = under_prefix(pairs())
    first = next(iter(tensors))
    tensors[first] = tensors[first].bfloat16()
    block = read_adapter(write(tmp_path / "adapter", tensors)).blocks[UP]
    assert isinstance(block, LowRank)
    assert block.a.dtype == block.b.dtype == torch.float32
    assert torch.equal(block.a, tensors[first].float())


def test_another_adapters_tensors_are_left_alone(tmp_path: Path) -> None:
    """PEFT writes those whose name begins with the saved adapter's, and ignores them."""
    tensors = under_prefix(pairs())
    others = {name.replace(".weight", ".default2.weight"): t + 1 for name, t in tensors.items()}
    adapter = read_adapter(write(tmp_path / "adapter", {**tensors, **others}))
    assert adapter.unused == ()
    block = adapter.blocks[UP]
    assert isinstance(block, LowRank)
    assert torch.equal(block.a, tensors[f"{PREFIX}{UP}.lora_A.weight"])


def test_of_two_names_neither_is_chosen(tmp_path: Path) -> None:
    names = under_prefix(pairs())
    both = {
        name.replace(".weight", f".{adapter}.weight"): tensor.clone()
        for name, tensor in names.items()
        for adapter in ("a", "b")
    }
    with pytest.raises(AdapterError, match="holds several adapters"):
        read_adapter(write(tmp_path / "adapter", both))


def test_a_copy_and_the_base_s_own(tmp_path: Path) -> None:
    """A whole state dict: the trained head under its wrapper's names, and the base's beside it."""
    head = torch.randn(103, 48)
    tensors = under_prefix(
        {
            **pairs(),
            "lm_head.modules_to_save.default.weight": head,
            "lm_head.original_module.weight": torch.randn(103, 48),
        }
    )
    folder = write(tmp_path / "adapter", tensors, modules_to_save=["lm_head"])
    adapter = read_adapter(folder)
    again = PeftAdapter.read(folder, model=llama())
    assert adapter.unused == ()
    for saved in (adapter.modules_to_save, again.parameters):
        assert set(saved) == {"lm_head.weight"}
        assert torch.equal(saved["lm_head.weight"], head)


def test_plain_names() -> None:
    assert plain("module.module.base_model.model.model.layers.0.q") == "model.layers.0.q"
    assert plain("base_model.model._orig_mod.module.x") == "x"


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "q_proj", True),
        ("_proj", "model.layers.0.q_proj", False),
        ("layers.0.q_proj", "model.layers.0.q_proj", True),
        ("layers.0.q_proj", "model.layers.10.q_proj", False),
        ("layers.1.q_proj", "model.layersX1.q_proj", True),
        (r"layers\.[01]\.q_proj", "model.layers.1.q_proj", True),
        (r"q_proj|v_proj", "model.layers.1.v_proj", True),
        ("^model.layers.1.q_proj", "model.layers.1.q_proj", True),
        ("", "model", False),
    ],
)
def test_patterns_end_names_as_in_peft(pattern: str, name: str, fits: bool) -> None:
    from peft.utils.other import get_pattern_key

    assert matches_end(pattern, name) == fits
    assert (get_pattern_key([pattern], name) == pattern) == fits


def test_stacked_weights_of_peft_0_21(tmp_path: Path) -> None:
    """Computed by PEFT 0.21.2, which takes the other dimension for inputs than 0.18.1."""
    case = Path(__file__).parent / "oracle" / "mixtral_target_parameters"
    bone_fx.fold_checkpoint(case / "base", adapters=[case / "adapter"], output=tmp_path / "out")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = load_file(case / "expected.safetensors")
    state: dict[str, Tensor] = model.state_dict()
    for key, tensor in expected.items():
        if key.startswith("merged."):
            difference = float((state[key.removeprefix("merged.")] - tensor).abs().max())
            assert difference <= 1e-6 * max(1.0, float(tensor.abs().max())), key
    with torch.no_grad():
        logits = model(expected["input_ids"], attention_mask=expected["attention_mask"]).logits
    size = max(1.0, float(expected["logits"].abs().max()))
    assert float((logits - expected["logits"]).abs().max()) <= 1e-5 * size


@pytest.mark.parametrize(
    ("version", "is_transposed", "turned"),
    [
        ("0.18.1", False, True),
        ("0.18.1", True, True),
        ("0.19.0", False, True),
        ("0.19.1", True, False),
        ("0.20.0", False, False),
        ("0.21.2", True, True),
    ],
)
def test_square_experts_hang_on_the_version(
    version: str, is_transposed: bool, turned: bool, tmp_path: Path
) -> None:
    """As `ParamWrapper` of each version has it; in shapes both sides look alike."""
    model = mixtral(intermediate_size=48)
    for layer in model.model.layers:
        layer.mlp.experts.is_transposed = is_transposed
    generator = torch.Generator().manual_seed(4)
    tensors: dict[str, Tensor] = {}
    for i in range(2):
        module = f"model.layers.{i}.mlp.experts"
        tensors[f"{module}.lora_A.weight"] = torch.randn(12, 48, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(48, 12, generator=generator)
    fields = {"r": 3, "target_modules": [], "target_parameters": ["experts.down_proj"]}
    folder = write(tmp_path / "adapter", under_prefix(tensors), peft_version=version, **fields)
    name = "model.layers.1.mlp.experts.down_proj"
    a = tensors["model.layers.1.mlp.experts.lora_A.weight"].reshape(4, -1, 48)
    b = tensors["model.layers.1.mlp.experts.lora_B.weight"].reshape(48, -1, 4)
    order = "e i o" if turned else "e o i"
    expected = 2.0 * torch.einsum(f"o r e, e r i -> {order}", b, a)
    ours = with_parameters(read_adapter(folder), model).blocks[name]
    verified = PeftAdapter.read(folder, model=model).blocks[name]
    for block in (ours, verified):
        assert isinstance(block, LowRank)
        torch.testing.assert_close(block.scale * (block.b @ block.a), expected)


def test_square_experts_of_no_version(tmp_path: Path) -> None:
    module = "model.layers.{}.mlp.experts"
    tensors = {}
    for i in range(2):
        tensors[f"{module.format(i)}.lora_A.weight"] = torch.randn(12, 48)
        tensors[f"{module.format(i)}.lora_B.weight"] = torch.randn(48, 12)
    fields = {"r": 3, "target_modules": [], "target_parameters": ["experts.down_proj"]}
    folder = write(tmp_path / "adapter", under_prefix(tensors), peft_version=None, **fields)
    with pytest.raises(AdapterError, match="hangs on the version of PEFT"):
        with_parameters(read_adapter(folder), mixtral(intermediate_size=48))
