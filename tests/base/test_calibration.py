"""A run whose weights come and go measures what the folded model measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from bone_fx.adapter_folder import read_adapters
from bone_fx.base.calibration import (
    CalibrationError,
    Text,
    built_in_text,
    run_in_pieces,
    token_ids,
)
from bone_fx.base.loading import open_base, skeleton
from bone_fx.deploy.checkpoint_inputs import adapted_sites
from bone_fx.passes.fold import fold_weight
from bone_fx.weights.apply_adapters import fold_recipes
from bone_fx.weights.load_plan import recipes_for
from bone_fx.weights.recipes.recipe import Recipe
from tests.end_to_end.tiny import tiny_adapter, tiny_base, tiny_tokenizer

IDS = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(3))


def pieces(base: Path, adapter: Path | None) -> tuple[PreTrainedModel, dict[str, Recipe], Any]:
    """A skeleton, its folded recipes, and what was folded."""
    checkpoint = open_base(base)
    model, plan = skeleton(checkpoint, torch.float32, attn_implementation="eager")
    adapters = read_adapters([adapter] if adapter else [])
    sites = adapted_sites(model, adapters)
    recipes = fold_recipes(recipes_for(model, plan, checkpoint.tensors), sites, adapters)
    return model, recipes, (sites, adapters)


def measured(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """The same by plain hooks on a model that holds its weights."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(
                lambda _, args, name=f"{name}.weight": found.__setitem__(
                    name, args[0].double().flatten(0, 1).square().mean(0)
                )
            )
    with torch.no_grad():
        model(input_ids=ids)
    return found


def assert_alike(found: Any, expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, moments in expected.items():
        squares, factors = found[name].squares, found[name].factors
        assert squares.dtype == factors.dtype == torch.float32
        torch.testing.assert_close(squares.double(), moments, rtol=1e-5, atol=1e-9)
        assert bool((factors.square().sum(1) <= squares).all())


@pytest.mark.parametrize("tied", [True, False])
def test_moments_of_the_folded_model(tied: bool, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", tie_word_embeddings=tied)
    model, recipes, (sites, adapters) = pieces(base, tiny_adapter(tmp_path / "adapter"))
    found = run_in_pieces(model, recipes, IDS)
    real = LlamaForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    for name, site in sites.items():
        steps = [(a.config.method, a.blocks[name]) for _, a in adapters]
        weight = real.get_parameter(site.weight_name).data
        weight.copy_(fold_weight(weight, steps, transposed=site.transposed, layer=name))
    assert found.tokens == 48
    qkv = {id(found.of_inputs[f"model.layers.1.self_attn.{p}_proj.weight"]) for p in "qkv"}
    assert len(qkv) == 1  # they read one tensor
    assert_alike(found.of_inputs, measured(real, IDS))
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert {type(p).__name__ for p in model.parameters()} == {"FakeTensor"}


def test_weights_stored_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=48, n_layer=2, n_head=3, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model, recipes, _ = pieces(tmp_path, None)
    real = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert_alike(run_in_pieces(model, recipes, IDS).of_inputs, measured(real, IDS))


def test_weight_used_outside_of_its_module(tmp_path: Path) -> None:
    model, recipes, _ = pieces(tiny_base(tmp_path), None)
    up = model.get_submodule("model.layers.0.mlp.up_proj")
    up.forward = lambda x: x @ model.get_parameter("model.layers.1.mlp.up_proj.weight").t()
    with pytest.raises(CalibrationError, match=r"down_proj\.weight is not computed"):
        run_in_pieces(model, recipes, IDS)


def test_model_that_refuses_the_ids(tmp_path: Path) -> None:
    model, recipes, _ = pieces(tiny_base(tmp_path), None)
    with pytest.raises(CalibrationError, match="piece by piece"):
        run_in_pieces(model, recipes, IDS + 128)


def test_a_configuration_may_leave_the_size_of_the_vocabulary_open(tmp_path: Path) -> None:
    base = open_base(tiny_base(tmp_path))
    tokenizer = tiny_tokenizer(tmp_path)
    text = Text("a text", "one text of a few words")
    ids = token_ids(base, text, tokenizer)
    # As in a configuration of code that came with a checkpoint, whose fields nobody checks.
    base.config.__dict__.update(vocab_size=None)
    assert torch.equal(token_ids(base, text, tokenizer), ids)
    base.config.vocab_size = int(ids.max())
    with pytest.raises(CalibrationError, match="ids are not the model's"):
        token_ids(base, text, tokenizer)


def test_largest_keys_and_values_of_a_cache(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    model, recipes, _ = pieces(base, None)
    half = torch.arange(16).roll(8)  # the first layer's pairs; the second's are not told
    found = run_in_pieces(model, recipes, IDS, [half, None]).of_cache
    real = LlamaForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    with torch.no_grad():
        cache = real(input_ids=IDS, use_cache=True).past_key_values
    for layer, (keys, values) in found.items():
        kept = cache.layers[layer]
        for head, channel in ((0, 3), (2, 11)):
            key = kept.keys[:, head, :, channel]
            if layer == 0:
                key = (key**2 + kept.keys[:, head, :, (channel + 8) % 16] ** 2).sqrt()
            torch.testing.assert_close(keys[head, channel], key.abs().max(), rtol=1e-5, atol=0)
            value = kept.values[:, head, :, channel].abs().max()
            torch.testing.assert_close(values[head, channel], value, rtol=1e-5, atol=0)
    assert sorted(found) == [0, 1]


@pytest.mark.parametrize("content", ["{", '{"model": {"type": "BPE", "vocab": {"a": -1}}}'])
def test_a_tokenizer_that_its_library_refuses(content: str, tmp_path: Path) -> None:
    base = open_base(tiny_base(tmp_path))
    tokenizer = tiny_tokenizer(tmp_path)
    (tokenizer / "tokenizer.json").write_text(content)
    with pytest.raises(CalibrationError, match="tokenizer cannot be read"):
        token_ids(base, built_in_text(), tokenizer)


def test_built_in_text_is_packaged() -> None:
    text = built_in_text()
    assert len(text.content.split()) > 600
    assert len(text.sha256) == 64


def test_inputs_of_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": 4}
    heads: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = MixtralConfig(vocab_size=128, num_experts_per_tok=2, **sizes, **heads)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    real = MixtralForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    experts = real.model.layers[0].mlp.experts
    expected = {}

    def keep(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, chosen, _weights = args
        expected["gate_up_proj"] = hidden.double().square().mean(0)
        rows = [
            experts._apply_gate(experts.gate_up_proj[e] @ hidden[token])
            for token, each in enumerate(chosen)
            for e in each
        ]
        expected["down_proj"] = torch.stack(rows).double().square().mean(0)

    experts.register_forward_pre_hook(keep)
    with torch.no_grad():
        real(input_ids=IDS)
    model, recipes, _ = pieces(tmp_path, None)
    found = run_in_pieces(model, recipes, IDS).of_inputs
    prefix = "model.layers.0.mlp.experts."
    of_experts = {n.removeprefix(prefix): m for n, m in found.items() if n.startswith(prefix)}
    assert_alike(of_experts, expected)
    assert "_apply_gate" not in vars(model.get_submodule(prefix[:-1]))
