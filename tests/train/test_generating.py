"""`generate` of an adapted module: PEFT's tokens, with the values of the blocks as they are now."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import pipeline

import bone_fx
from bone_fx.errors import UsageError
from tests.train.peft_models import llama, net, x_of_net

pytestmark = pytest.mark.usefixtures("captures_once")

IDS = torch.tensor([[5, 9, 3, 40], [7, 1, 2, 8]])
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def adapted_llama(**fields: Any) -> bone_fx.AdaptedModule:
    """A Llama that keeps its cache, under blocks that are not zero."""
    config = {"r": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_weights": False}
    torch.manual_seed(1)
    model = llama(use_cache=True)
    return bone_fx.get_peft_model(model, bone_fx.BoneConfig(**{**config, **fields})).eval()


def moved(adapted: bone_fx.AdaptedModule, leaf: str = "bone_block") -> None:
    """Change every trainable parameter as an optimizer does that writes to `.data`."""
    torch.manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if leaf in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))


def same_as_merged(adapted: bone_fx.AdaptedModule) -> torch.Tensor:
    expected = adapted.merge_and_unload().generate(IDS, **GREEDY)
    tokens = adapted.generate(IDS, **GREEDY)
    assert torch.equal(tokens, expected)
    return tokens


def test_tokens_are_those_of_the_unmerged_forward() -> None:
    adapted = adapted_llama()
    tokens = adapted.generate(IDS, **GREEDY)
    with torch.no_grad():
        logits = adapted(input_ids=tokens[:, :-1], attention_mask=torch.ones(2, 15).long()).logits
    assert torch.equal(logits[:, 3:].argmax(-1), tokens[:, 4:])


@pytest.mark.parametrize("init_weights", [False, "bat"])
def test_blocks_as_they_are_now(init_weights: Any) -> None:
    adapted = adapted_llama(init_weights=init_weights)
    before = same_as_merged(adapted)
    twin = adapted.__dict__["_twin"]
    moved(adapted)
    after = same_as_merged(adapted)
    assert not torch.equal(before, after)
    assert adapted.__dict__["_twin"] is twin
    with adapted.disable_adapter():
        base = adapted.generate(IDS, **GREEDY)
    assert torch.equal(base, adapted.base_model.model.generate(IDS, **GREEDY))
    assert torch.equal(same_as_merged(adapted), after)


def test_only_layers_whose_blocks_changed_are_folded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from bone_fx.train.verbs import generating

    adapted = adapted_llama()
    adapted.generate(IDS, **GREEDY)
    folded: list[str] = []
    fold_weight = generating.fold_weight

    def listening(*args: Any, layer: str, **more: Any) -> Any:
        folded.append(layer)
        return fold_weight(*args, layer=layer, **more)

    monkeypatch.setattr(generating, "fold_weight", listening)
    adapted.generate(IDS, **GREEDY)
    assert not folded
    with torch.no_grad():
        adapted.get_parameter("model.layers.1.self_attn.q_proj.bone_block.default").mul_(2)
    same_as_merged(adapted)
    assert folded == ["model.layers.1.self_attn.q_proj"]


def test_adapters_that_change_modules_that_train_and_weights_that_move() -> None:
    adapted = adapted_llama(modules_to_save=["lm_head"])
    first = same_as_merged(adapted)
    moved(adapted, "lm_head")
    assert not torch.equal(same_as_merged(adapted), first)
    second = bone_fx.BoneConfig(r=4, target_modules=["k_proj"], init_weights=False)
    adapted.add_adapter("second", second)
    adapted.set_adapter(["default", "second"])
    both = same_as_merged(adapted)
    adapted.merge_adapter()
    assert torch.equal(same_as_merged(adapted), both)
    adapted = copy.deepcopy(adapted)
    assert same_as_merged(adapted).shape == both.shape


def test_a_base_that_trains_too() -> None:
    torch.manual_seed(1)
    config = bone_fx.BoneConfig(r=8, target_modules=["q_proj"], init_weights=False)
    x = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    adapted = bone_fx.adapt(llama(use_cache=True), config, x, freeze_base=False).eval()
    first = same_as_merged(adapted)
    with torch.no_grad():
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
            weight = adapted.get_parameter(name)
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(same_as_merged(adapted), first)


def test_settings_and_a_pipeline() -> None:
    adapted = adapted_llama()
    adapted.generation_config.max_new_tokens = 3
    adapted.generation_config.eos_token_id = None
    assert adapted.generate(IDS).shape == (2, 7)
    assert adapted.can_generate()
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words())
    made = pipeline("text-generation", model=adapted, tokenizer=tokenizer)
    [answer] = made("w3 w4 w5", max_new_tokens=4, do_sample=False, return_full_text=False)
    ids = adapted.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].split() == [f"w{token}" for token in ids[0, 3:]]


def words() -> Any:
    """A tokenizer of 64 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def test_a_model_that_does_not_generate() -> None:
    config = bone_fx.BoneConfig(r=2, target_modules=["lin0"])
    adapted = bone_fx.adapt(net(), config, {"x": x_of_net()})
    with pytest.raises(UsageError, match="Net has no generate"):
        adapted.generate(x_of_net())
