"""The verbs of an adapted module, on a tiny Llama and a tiny GPT-2 (Conv1D)."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import bone_fx
from bone_fx.adapter_folder import write_adapter
from bone_fx.errors import AdapterError, CaptureError, FoldError, SiteError, UsageError

pytestmark = pytest.mark.usefixtures("captures_once")

Q = "model.layers.0.self_attn.q_proj"
CONFIG = bone_fx.BoneConfig(r=20, target_modules=["q_proj", "down_proj"])
BAT = bone_fx.BoneConfig(r=8, target_modules=["q_proj", "v_proj"], init_weights="bat")


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(0, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def stir(adapted: bone_fx.AdaptedModule, name: str) -> None:
    """Move an adapter's blocks away from zero."""
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if key.endswith(f".bone_block.{name}"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(module: Any) -> Tensor:
    result: Tensor = module(**inputs()).logits.detach()
    return result


def two_adapters() -> bone_fx.AdaptedModule:
    adapted = bone_fx.adapt(llama(), CONFIG, inputs(), adapter_name="first")
    adapted.add_adapter("second", BAT)
    stir(adapted, "first")
    stir(adapted, "second")
    return adapted


def test_verbs_change_the_graph_and_come_back() -> None:
    model = llama()
    base = logits(model)
    adapted = bone_fx.adapt(model, CONFIG, inputs(), adapter_name="first")
    torch.testing.assert_close(logits(adapted), base, rtol=0, atol=1e-6)
    stir(adapted, "first")
    first = logits(adapted)
    assert float((first - base).abs().max()) > 1e-2
    adapted.add_adapter("second", BAT)
    stir(adapted, "second")
    assert torch.equal(logits(adapted), first)
    adapted.set_adapter(["first", "second"])
    both = logits(adapted)
    adapted.set_adapter(["second", "first"])
    assert not torch.allclose(both, logits(adapted), atol=1e-5)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)
        assert "adapted_linear" not in str(adapted.graph)
    adapted.set_adapter("first")
    assert torch.equal(logits(adapted), first)
    adapted.delete_adapter("second")
    assert not [name for name in adapted.state_dict() if "second" in name]
    with pytest.raises(UsageError, match="no adapter 'second'"):
        adapted.set_adapter("second")
    with pytest.raises(UsageError, match="already"):
        adapted.add_adapter("first", CONFIG)
    assert torch.equal(logits(model), base)


def test_only_active_adapters_train() -> None:
    adapted = two_adapters()

    def trains() -> set[str]:
        return {n.rpartition(".")[2] for n, p in adapted.named_parameters() if p.requires_grad}

    assert trains() == {"first"}
    adapted.set_adapter("second")
    assert trains() == {"second"}
    trainable, total = adapted.get_nb_trainable_parameters()
    assert trainable == 2 * (6 * 8 * 8 + 3 * 8 * 8)
    assert total > trainable


def test_merge_keeps_the_bytes_of_the_base() -> None:
    adapted = two_adapters()
    adapted.set_adapter(["first", "second"])
    before = adapted.get_parameter(f"{Q}.weight").clone()
    unmerged = logits(adapted)
    adapted.merge_adapter()
    assert not torch.equal(adapted.get_parameter(f"{Q}.weight"), before)
    torch.testing.assert_close(logits(adapted), unmerged, rtol=0, atol=1e-5)
    adapted.unmerge_adapter()
    assert torch.equal(adapted.get_parameter(f"{Q}.weight"), before)
    assert torch.equal(logits(adapted), unmerged)


def test_delta_weight_is_what_folding_adds() -> None:
    adapted = two_adapters()
    adapted.set_adapter(["first", "second"])
    weight = adapted.get_parameter(f"{Q}.weight").detach()
    expected = adapted.fold().get_parameter(f"{Q}.weight") - weight
    deltas = [adapted.get_delta_weight(Q, name) for name in ("first", "second")]
    torch.testing.assert_close(deltas[0] + deltas[1], expected, rtol=0, atol=1e-6)
    assert not torch.allclose(
        adapted.get_delta_weight(Q, "second"),
        adapted.fold(["second"]).get_parameter(f"{Q}.weight") - weight,
        atol=1e-4,
    )
    with pytest.raises(UsageError, match="no block"):
        adapted.get_delta_weight("model.layers.0.mlp.up_proj", "first")


def test_merge_and_unload_gives_the_class_back() -> None:
    model = llama()
    adapted = bone_fx.adapt(model, CONFIG, inputs())
    stir(adapted, "default")
    before = {name: p.clone() for name, p in model.named_parameters()}
    merged: Any = adapted.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=1e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    shared = merged.model.embed_tokens.weight
    assert shared.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert merged.generate(**inputs(), max_new_tokens=3).shape == (2, 10)


def test_a_tied_head_is_refused_or_untied() -> None:
    config = bone_fx.BoneConfig(r=16, target_modules=["lm_head"])
    with pytest.raises(SiteError, match="tied"):
        bone_fx.adapt(llama(), config, inputs())
    model = llama()
    adapted = bone_fx.adapt(model, config, inputs(), untie=True)
    base = logits(model)
    torch.testing.assert_close(logits(adapted), base, rtol=0, atol=1e-6)
    stir(adapted, "default")
    merged: Any = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=1e-5)
    assert torch.equal(merged.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert merged.config.tie_word_embeddings is False
    assert model.config.tie_word_embeddings is True
    assert torch.equal(logits(model), base)


def test_conv1d_and_dropout() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=3, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    adapter = bone_fx.BoneConfig(r=20, target_modules=["c_attn", "c_fc"], miss_dropout=0.3)
    adapted = bone_fx.adapt(model, adapter, inputs())
    stir(adapted, "default")
    evaluated = logits(adapted)
    assert torch.equal(evaluated, logits(adapted))
    torch.testing.assert_close(logits(adapted.fold()), evaluated, rtol=0, atol=1e-5)
    adapted.train()
    code = adapted.code
    adapted.train()
    assert adapted.code == code
    assert not torch.equal(logits(adapted), logits(adapted))
    adapted.eval()
    assert torch.equal(logits(adapted), evaluated)
    assert adapted.peft_config["default"].peft_type == "MISS"


def test_optimizers_stay_valid_and_copies_are_independent() -> None:
    adapted = bone_fx.adapt(llama(), CONFIG, inputs()).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted.add_adapter("second", BAT)
    copied = copy.deepcopy(adapted)
    before = logits(copied)
    adapted(**inputs(), labels=inputs()["input_ids"]).loss.backward()
    optimizer.step()
    assert not torch.allclose(logits(adapted), before, atol=1e-6)
    assert torch.equal(logits(copied), before)
    with pytest.raises(UsageError, match="save_pretrained"):
        copied.__reduce__()


def test_labels_give_the_models_own_loss() -> None:
    model = llama()
    labels = inputs()["input_ids"].clone()
    labels[0, :3] = -100
    adapted = bone_fx.adapt(model, CONFIG, inputs())
    expected = model(**inputs(), labels=labels).loss
    torch.testing.assert_close(adapted(**inputs(), labels=labels).loss, expected)


def test_what_is_no_site_is_refused_by_name() -> None:
    config = bone_fx.BoneConfig(r=16, target_modules=["q_proj", "embed_tokens", "nothing"])
    with pytest.warns(UserWarning, match=r"embed_tokens.*nothing"):
        adapted = bone_fx.adapt(llama(tie_word_embeddings=False), config, inputs())
    reasons = {refusal.name: refusal.reason for refusal in adapted.refused}
    assert "not a linear layer" in reasons["model.embed_tokens.weight"]
    assert "matched no linear layer" in reasons["nothing"]
    with pytest.raises(SiteError, match="no_such_layer"):
        bone_fx.adapt(llama(), bone_fx.BoneConfig(target_modules=["no_such_layer"]), inputs())
    with pytest.raises(SiteError, match="divide"):
        bone_fx.adapt(
            llama(),
            bone_fx.BoneConfig(r=7, target_modules="all-linear", init_weights="bat"),
            inputs(),
        )


class Headed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(16, 16)
        self.norm = torch.nn.BatchNorm1d(16)
        self.score = torch.nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.score(torch.tanh(self.norm(self.body(x))))
        return result


def headed() -> tuple[bone_fx.AdaptedModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    config = bone_fx.BoneConfig(r=4, target_modules=["body"], modules_to_save=["score"])
    adapted = bone_fx.adapt(Headed().eval(), config, (x,), adapter_name="one")
    adapted.add_adapter("two", config)
    with torch.no_grad():
        for number, adapter in enumerate(adapted._adapters.values(), start=1):
            for parameter in (*adapter.blocks.values(), *adapter.saved.values()):
                parameter.add_(0.1 * number)
    return adapted, x


def test_a_cast_reaches_what_is_not_mounted() -> None:
    adapted, x = headed()
    with adapted.disable_adapter():
        base = adapted(x)
    adapted.merge_adapter()
    adapted.double()
    adapted.unmerge_adapter()
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(x.double()), base.double(), rtol=0, atol=1e-6)
    adapted.set_adapter("two")
    assert adapted(x.double()).dtype == torch.float64


def test_merging_takes_the_head_of_what_is_merged() -> None:
    adapted, x = headed()
    expected = adapted.fold("two")(x)
    adapted.merge_adapter("two")
    torch.testing.assert_close(adapted(x), expected, rtol=0, atol=1e-6)


def test_a_change_that_fails_leaves_everything_as_it_was() -> None:
    adapted, x = headed()
    before = adapted(x)
    with torch.no_grad():
        adapted.get_parameter("body.bone_block.two").fill_(float("inf"))
    with pytest.raises(FoldError, match="body"):
        adapted.merge_adapter(["two"])
    assert torch.equal(adapted(x), before)
    adapted.add_adapter("three", adapted.peft_config["one"])
    assert torch.equal(adapted(x), before)


def test_statistics_of_a_training_forward_stay_out_of_the_base() -> None:
    torch.manual_seed(0)
    model = Headed().eval()
    x = torch.randn(4, 16)
    config = bone_fx.BoneConfig(r=4, target_modules=["body"])
    adapted = bone_fx.adapt(model, config, (x,)).train()
    adapted(x)
    assert int(model.norm.num_batches_tracked) == 0
    assert int(adapted.get_buffer("norm.num_batches_tracked")) == 1
    adapted.eval()
    expected = adapted(x)
    torch.testing.assert_close(adapted.fold()(x), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(adapted.merge_and_unload()(x), expected, rtol=0, atol=1e-6)


def test_a_body_without_its_head_is_adapted() -> None:
    """Its layers stand at the root, under a name that many models use."""
    body: Any = llama().model
    adapted = bone_fx.adapt(body, CONFIG, inputs(), gradient_checkpointing=True)
    expected = body(**inputs()).last_hidden_state
    torch.testing.assert_close(adapted(**inputs()).last_hidden_state, expected, rtol=0, atol=1e-6)
    assert len(adapted.layer_modules()) == 2


def test_a_part_that_has_the_name_of_a_verb_is_refused() -> None:
    model = torch.nn.Sequential()
    model.fold = torch.nn.Linear(16, 16)
    config = bone_fx.BoneConfig(r=4, target_modules=["fold"])
    with pytest.raises(UsageError, match="called fold"):
        bone_fx.adapt(model, config, (torch.randn(3, 16),))


def test_a_classification_task_trains_the_head() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=96, hidden_size=48, num_hidden_layers=1, num_attention_heads=3)
    config.intermediate_size = 80
    adapter = bone_fx.BoneConfig(r=16, target_modules=["query"], task_type="SEQ_CLS")
    adapted = bone_fx.adapt(BertForSequenceClassification(config).eval(), adapter, inputs())
    assert adapted.get_parameter("classifier.weight").requires_grad
    assert adapter.modules_to_save is None


def test_all_linear_leaves_out_what_each_adapters_own_task_does(tmp_path: Path) -> None:
    """Not what the first adapter's task did; a folder says nothing of the head by itself."""
    torch.manual_seed(0)
    model, x = Headed().eval(), torch.randn(3, 16)
    everything = bone_fx.BoneConfig(r=4, target_modules="all-linear")
    classifier = replace(everything, task_type="SEQ_CLS")
    blocks = {"body": torch.ones(4, 16)}
    write_adapter(tmp_path, classifier, blocks, {})
    for names in (["plain", "task"], ["task", "plain"]):
        first = everything if names[0] == "plain" else tmp_path
        adapted = bone_fx.adapt(model, first, (x,), adapter_name=names[0])
        if names[1] == "plain":
            adapted.add_adapter("plain", everything)
        else:
            adapted.load_adapter(tmp_path, "task")
        adapted.set_adapter(names)
        assert adapted.get_parameter("score.bone_block.plain").requires_grad
        assert not any(n == "score.bone_block.task" for n, _ in adapted.named_parameters())
        stir(adapted, "plain")
        torch.testing.assert_close(adapted.fold()(x), adapted(x), rtol=0, atol=1e-5)


def test_a_tied_head_in_modules_to_save_is_a_copy_that_trains(tmp_path: Path) -> None:
    config = bone_fx.BoneConfig(r=16, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = llama()
    adapted = bone_fx.adapt(model, config, inputs()).train()
    assert not adapted.refused
    optimizer = torch.optim.SGD(adapted.parameter_groups(), lr=0.5)
    adapted(**inputs(), labels=inputs()["input_ids"]).loss.backward()
    optimizer.step()
    adapted.eval()
    head, embedding = (
        adapted.get_parameter(f"{name}.weight") for name in ("lm_head", "model.embed_tokens")
    )
    assert not torch.equal(head, embedding)
    assert torch.equal(embedding, model.get_input_embeddings().weight)
    trained = logits(adapted)
    torch.testing.assert_close(logits(adapted.fold()), trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), trained, rtol=0, atol=1e-5)
    adapted.save_pretrained(tmp_path)
    again = bone_fx.adapt(llama(), tmp_path, inputs()).eval()
    torch.testing.assert_close(logits(again), trained, rtol=0, atol=1e-6)


def test_what_a_person_froze_stays_frozen() -> None:
    adapted = bone_fx.adapt(llama(), CONFIG, inputs())
    blocks = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    first = next(iter(blocks))
    blocks[first].requires_grad_(False)
    adapted.gradient_checkpointing_enable()
    with adapted.disable_adapter():
        pass
    trains = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trains == set(blocks) - {first}
    copied = copy.deepcopy(adapted)
    assert {n for n, p in copied.named_parameters() if p.requires_grad} == trains


def test_a_copy_has_the_statistics() -> None:
    net, x = (
        nn.Sequential(nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)),
        3 + inputs_of_net(),
    )
    config = bone_fx.BoneConfig(r=8, target_modules=["0"])
    adapted = bone_fx.adapt(net, config, (x,)).train()
    adapted(x)
    adapted.eval()
    assert torch.equal(copy.deepcopy(adapted)(x), adapted(x))
    with pytest.raises(AdapterError, match="statistics"):
        bone_fx.adapt(net, replace(config, modules_to_save=["1"]), (x,))


class _Norms(nn.Module):
    """An embedding that is tied, a layer norm, a batch norm, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 24)
        self.norm = nn.LayerNorm(24)
        self.body = nn.Linear(24, 24)
        self.head = nn.Linear(24, 11)
        self.head.weight = self.table.weight
        self.last = nn.BatchNorm1d(11)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(self.norm(self.table(x))).relu()
        result: Tensor = self.last(self.head(hidden))
        return result


def _norms() -> tuple[_Norms, bone_fx.AdaptedModule, Tensor]:
    torch.manual_seed(0)
    model, x = _Norms().eval(), torch.tensor([3, 7, 1, 10, 3])
    config = bone_fx.BoneConfig(r=8, target_modules=["body"])
    return model, bone_fx.adapt(model, config, (x,), freeze_base=False), x


def test_an_average_of_weights_gives_its_own_weights_back() -> None:
    model, adapted, x = _norms()
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    average = torch.optim.swa_utils.AveragedModel(adapted, multi_avg_fn=ema, use_buffers=True)
    average.update_parameters(adapted)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.3)
    adapted.train()(x).square().sum().backward()
    optimizer.step()
    average.update_parameters(adapted)
    expected = average.module.eval()(x)
    assert not torch.allclose(expected, adapted.eval()(x), atol=1e-2)
    for copied in (average.module, copy.deepcopy(average.module)):
        merged = copied.merge_and_unload()
        torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-5)
        assert merged.head.weight is merged.table.weight
    assert adapted.merge_and_unload().norm.weight.data_ptr() == model.norm.weight.data_ptr()


def test_a_cast_is_of_all_that_is_given_back() -> None:
    model, adapted, x = _norms()
    adapted.to(torch.bfloat16)
    merged = adapted.merge_and_unload()
    floats = [value for value in merged.state_dict().values() if value.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.bfloat16}
    assert torch.equal(merged(x), adapted(x))
    assert merged.head.weight is merged.table.weight
    assert model.body.weight.dtype == torch.float32


def inputs_of_net() -> Tensor:
    return torch.randn(6, 48, generator=torch.Generator().manual_seed(1))


def test_what_would_lose_adapters_is_refused() -> None:
    adapted = bone_fx.adapt(llama(), CONFIG, inputs())
    with pytest.raises(UsageError, match="assign"):
        adapted.load_state_dict(adapted.state_dict(), assign=True)
    adapted.load_state_dict(adapted.state_dict())
    with pytest.raises(UsageError, match="DistributedDataParallel"):
        adapted._replicate_for_data_parallel()


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return -dy


class OwnBackward(nn.Module):
    """Changes a gradient in one of three ways, or uses a weight in both."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how = nn.Linear(48, 48), how
        if how == "module hook":
            self.body.register_full_backward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        if self.how == "function":
            hidden = _Reversed.apply(hidden)  # type: ignore[no-untyped-call]
        elif self.how == "hook" and hidden.requires_grad:
            hidden.register_hook(torch.neg)
        return hidden @ self.body.weight if self.how == "both ways" else hidden


@pytest.mark.parametrize("how", ["function", "hook", "module hook"])
def test_a_backward_of_its_own_is_refused(how: str) -> None:
    apply = torch.autograd.Function.__dict__["apply"]
    with pytest.raises(CaptureError, match="backward"):
        bone_fx.adapt(
            OwnBackward(how), bone_fx.BoneConfig(r=8, target_modules=["body"]), (inputs_of_net(),)
        )
    assert torch.autograd.Function.__dict__["apply"] is apply


def test_a_thread_that_trains_during_a_capture_is_left_alone() -> None:
    x = torch.ones(2, requires_grad=True)
    gradients: list[Tensor] = []

    def train() -> None:
        y = _Reversed.apply(x)  # type: ignore[no-untyped-call]
        y.register_hook(gradients.append)
        y.sum().backward()

    class Waiting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=train)
            thread.start()
            thread.join()
            return super().forward(x)

    net = nn.Sequential(Waiting(48, 48))
    bone_fx.adapt(net, bone_fx.BoneConfig(r=8, target_modules=["0"]), (inputs_of_net(),))
    assert gradients
    assert all(torch.equal(gradient, torch.ones(2)) for gradient in gradients)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((2,), -float(len(gradients))))


def test_a_weight_that_is_used_both_ways_is_refused() -> None:
    with pytest.raises(SiteError, match="transposed"):
        bone_fx.adapt(
            OwnBackward("both ways"),
            bone_fx.BoneConfig(r=8, target_modules=["body"]),
            (inputs_of_net(),),
        )


def test_evaluation_in_inference_mode_leaves_training_possible() -> None:
    config = bone_fx.BoneConfig(r=8, target_modules="all-linear", init_weights="bat")
    adapted = bone_fx.adapt(llama(), config, inputs()).train()
    with torch.inference_mode():
        adapted(**inputs())
    adapted(**inputs(), labels=inputs()["input_ids"]).loss.backward()


def test_no_rows() -> None:
    net, x = nn.Sequential(nn.Linear(48, 8)), inputs_of_net()
    adapted = bone_fx.adapt(net, bone_fx.BoneConfig(r=16, target_modules=["0"]), (x,)).train()
    y = adapted(x[:0])
    assert y.shape == (0, 8)
    y.sum().backward()


def test_a_decoder_that_was_traced_without_labels_takes_none() -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = BartConfig(vocab_size=96, d_model=16, max_position_embeddings=32, **sizes)
    model = BartForConditionalGeneration(config)
    adapted = bone_fx.adapt(model, bone_fx.BoneConfig(r=8, target_modules=["q_proj"]), inputs())
    with pytest.raises(UsageError, match="capture again with labels"):
        adapted(**inputs(), labels=inputs()["input_ids"])
