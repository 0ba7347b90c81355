"""transformers' trainers take an adapted module as they take PEFT's: losses and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import bone_fx
from bone_fx.errors import UsageError
from tests.train.peft_models import llama, net, x_of_net

pytestmark = pytest.mark.usefixtures("captures_once")

STEPS = 6
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "training_args.bin"}


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, num_heads=4, decoder_start_token_id=0))


def rows(count: int = 24) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (count, 12), generator=generator).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 12, "labels": row} for row in ids]


def trained(library: Any, model: Any, target: str, kind: Any, arguments: Any, **more: Any) -> Any:
    # PEFT 0.18.1's class for SEQ_2_SEQ_LM asks transformers 5 for a method that it has no more.
    task = None if kind is Seq2SeqTrainer else "CAUSAL_LM"
    config = library.MissConfig(r=8, target_modules=[target], task_type=task)
    torch.manual_seed(1)
    trainer = kind(library.get_peft_model(model, config), arguments, train_dataset=rows())
    trainer.train(**more)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings(
    "ignore:Could not find a config file", "ignore:.is_gradient_checkpointing"
)
@pytest.mark.parametrize("seq2seq", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses_are_pefts_and_checkpoints_are_adapters(seq2seq: bool, tmp_path: Path) -> None:
    kind: Any = Seq2SeqTrainer if seq2seq else Trainer
    options: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
    }
    make: Any = Seq2SeqTrainingArguments if seq2seq else TrainingArguments
    build, target = (t5, "q") if seq2seq else (llama, "q_proj")

    def run(library: Any, name: str, **more: Any) -> Any:
        arguments = make(str(tmp_path / name), **options)
        return trained(library, build().train(), target, kind, arguments, **more)

    theirs, ours = run(peft, "peft"), run(bone_fx, "ours")
    assert isinstance(ours.model, peft.PeftModel)
    assert len(losses(ours)) == STEPS
    for one, other in zip(losses(ours), losses(theirs), strict=True):
        assert abs(one - other) <= 1e-4 * max(1.0, other)
    checkpoint = tmp_path / "ours" / f"checkpoint-{STEPS}"
    written = {path.name for path in checkpoint.iterdir()}
    assert written >= FILES
    assert "model.safetensors" not in written
    ours.save_model(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").iterdir()} == FILES
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "saved")
    blocks = peft.get_peft_model_state_dict(loaded)
    for name, block in bone_fx.get_peft_model_state_dict(ours.model).items():
        assert torch.equal(blocks[name], block)
    halfway = tmp_path / "ours" / "checkpoint-3"
    resumed = run(bone_fx, "resumed", resume_from_checkpoint=str(halfway))
    for one, other in zip(losses(resumed)[-3:], losses(ours)[-3:], strict=True):
        assert abs(one - other) <= 1e-6


def test_hidden_states_before_the_head() -> None:
    ids = torch.arange(12).view(2, 6)
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = bone_fx.BoneConfig(r=8, target_modules=["q_proj"], init_weights=False)
    adapted = bone_fx.get_peft_model(llama(), config).eval()
    hidden = adapted._call_backbone(**x).last_hidden_state
    head = adapted.get_output_embeddings()
    assert hidden.shape == (2, 6, 32)
    torch.testing.assert_close(head(hidden), adapted(**x).logits)
    with pytest.raises(UsageError, match="no such head"):
        adapted(**x, labels=ids, fused_lm_head=True)
    both = bone_fx.BoneConfig(r=8, target_modules=["q_proj", "lm_head"], init_weights=False)
    adapted = bone_fx.get_peft_model(llama(), both).eval()
    with pytest.raises(UsageError, match="the head has an adapter"):
        adapted._call_backbone(**x)


def test_the_base_model_is_called_like_the_module() -> None:
    ids = torch.arange(12).view(2, 6)
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    config = bone_fx.BoneConfig(r=8, target_modules=["q_proj"], init_weights=False)
    adapted = bone_fx.get_peft_model(llama(), config).eval()
    assert torch.equal(adapted.base_model(**x).loss, adapted(**x).loss)
    plain = bone_fx.adapt(
        net(), bone_fx.BoneConfig(r=2, target_modules=["lin0"]), {"x": x_of_net()}
    ).eval()
    assert torch.equal(plain.base_model(x_of_net()), plain(x_of_net()))


def test_sets_of_adapters_that_come_again_write_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(12).view(2, 6)
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    adapted = bone_fx.get_peft_model(
        llama(), bone_fx.BoneConfig(r=8, target_modules=["q_proj"], init_weights=False)
    )
    second = bone_fx.BoneConfig(r=4, target_modules=["v_proj"], init_weights=False)
    adapted.add_adapter("ref", second)
    outputs: dict[str, torch.Tensor] = {}
    written: list[str] = []
    rebuild = type(adapted)._rebuild

    def listening(self: Any) -> None:
        written.append("anew")
        rebuild(self)

    monkeypatch.setattr(type(adapted), "_rebuild", listening)
    for turn in range(3):
        for name in ("default", "ref"):
            adapted.set_adapter(name)
            logits = adapted(**x).logits
            if turn:
                with torch.no_grad():  # the graph that was kept has the parameters of now
                    for block in adapted._adapters[name].blocks.values():
                        block.mul_(1.5)
                assert not torch.equal(adapted(**x).logits, logits)
                with torch.no_grad():
                    for block in adapted._adapters[name].blocks.values():
                        block.div_(1.5)
            torch.testing.assert_close(outputs.setdefault(name, logits), logits)
            trains = [n for n, p in adapted.named_parameters() if p.requires_grad]
            assert trains
            assert all(n.endswith(f".{name}") for n in trains)
    assert len(written) == 2  # for "default" once more, which was active at first, and for "ref"


def test_verbs_of_pefts_class_that_are_not_ours_are_not_there() -> None:
    adapted = bone_fx.get_peft_model(llama(), bone_fx.BoneConfig(r=8, target_modules=["q_proj"]))
    assert isinstance(adapted, peft.PeftModel)
    for name in ("get_prompt", "special_peft_forward_args", "prompt_encoder"):
        assert not hasattr(adapted, name)
