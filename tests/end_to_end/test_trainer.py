"""transformers' Trainer and accelerate on an adapted module, against a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LabelSmoother

import bone_fx
from bone_fx.errors import UsageError
from tests.end_to_end.test_adapted import CONFIG, inputs, llama
from tests.tiers import slow

pytestmark = pytest.mark.usefixtures("captures_once")

RATE = 1e-2


def rows(number: int = 8, *, classes: int | None = None) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 96, (number, 7), generator=generator)
    labels = ids if classes is None else ids[:, 0] % classes
    mask = torch.ones_like(ids)
    return [
        {"input_ids": i, "attention_mask": m, "labels": y}
        for i, m, y in zip(ids, mask, labels, strict=True)
    ]


def arguments(
    folder: Path, kind: type[TrainingArguments] = TrainingArguments, **changes: Any
) -> TrainingArguments:
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    return kind(**fields)


def adapted_llama(**changes: Any) -> bone_fx.AdaptedModule:
    return bone_fx.adapt(llama(**changes), CONFIG, inputs()).train()


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def batch_of(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in data]) for key in data[0]}


def plain(adapted: bone_fx.AdaptedModule, data: list[dict[str, Tensor]]) -> list[float]:
    optimizer = torch.optim.AdamW(adapted.parameter_groups(), lr=RATE)
    found = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = adapted(**batch_of(data)).loss
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize(
    ("kind", "accumulated"),
    [
        *((Trainer, 1), (bone_fx.AdapterTrainer, 2)),
        *slow((Trainer, 2), (bone_fx.AdapterTrainer, 1)),
    ],
)
def test_trainer_equals_the_plain_loop(
    kind: type[Trainer], accumulated: int, tmp_path: Path
) -> None:
    data = rows()
    settings = arguments(
        tmp_path,
        per_device_train_batch_size=8 // accumulated,
        gradient_accumulation_steps=accumulated,
        activation_checkpointing=True,
    )
    adapted = adapted_llama()
    trainer = kind(model=adapted, args=settings, train_dataset=data, eval_dataset=data)
    trainer.train()
    expected = plain(adapted_llama(), data)
    assert expected[-1] < expected[0] - 0.1
    assert losses(trainer) == pytest.approx(expected, rel=1e-4)
    assert adapted.is_gradient_checkpointing
    found = trainer.evaluate()
    with torch.no_grad():
        assert found["eval_loss"] == pytest.approx(float(adapted(**batch_of(data)).loss), rel=1e-4)


def test_a_resumed_run_has_the_losses_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    def run(folder: Path, **changes: Any) -> bone_fx.AdapterTrainer:
        torch.manual_seed(0)
        settings = arguments(folder, save_strategy="steps", save_steps=3, **changes)
        adapted = adapted_llama(attention_dropout=0.2)
        return bone_fx.AdapterTrainer(model=adapted, args=settings, train_dataset=rows(16))

    whole = run(tmp_path / "whole")
    whole.train()
    saved = tmp_path / "whole" / "checkpoint-3"
    names = {path.name for path in saved.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= names
    assert not {"model.safetensors", "pytorch_model.bin"} & names
    again = run(tmp_path / "again")
    again.train(resume_from_checkpoint=str(saved))
    assert losses(again)[-3:] == losses(whole)[-3:]
    ours = dict(again.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(ours[name], parameter)


def test_a_classifier_trains_its_head_and_keeps_the_best(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=80,
        num_labels=3,
    )
    model = BertForSequenceClassification(config)
    adapter = bone_fx.BoneConfig(r=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    adapted = bone_fx.adapt(model, adapter, inputs()).train()
    data = rows(12, classes=3)
    settings = arguments(
        tmp_path,
        max_steps=8,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=2,
    )
    head = adapted.get_parameter("classifier.weight").detach().clone()
    trainer = bone_fx.AdapterTrainer(
        model=adapted, args=settings, train_dataset=data, eval_dataset=data
    )
    trainer.train()
    assert losses(trainer)[0] < 2  # a mean over both halves of a batch, not their sum
    trained = adapted.get_parameter("classifier.weight")
    assert not torch.equal(trained, head)
    best = trainer.state.best_model_checkpoint
    assert best is not None
    loaded = bone_fx.adapt(model.eval(), best, inputs())
    assert torch.equal(loaded.get_parameter("classifier.weight"), trained)
    prediction = trainer.predict(data).predictions
    torch.testing.assert_close(
        torch.as_tensor(prediction), loaded(**batch_of(data)).logits.detach(), rtol=0, atol=1e-5
    )


def test_a_token_classifier_trains_its_head_and_what_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=80,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForTokenClassification(config)
    adapter = bone_fx.BoneConfig(
        r=16,
        target_modules=["query", "value"],
        task_type="TOKEN_CLS",
        modules_to_save=["LayerNorm"],
    )
    data = rows(8)
    for row in data:
        row["labels"] = row["input_ids"] % 3
        row["labels"][-1] = -100
    adapted = bone_fx.adapt(model, adapter, inputs()).train()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "classifier.bias"} < trained
    assert len([name for name in trained if "LayerNorm" in name]) == 2 * 5
    settings = arguments(tmp_path, per_device_train_batch_size=8)
    trainer = bone_fx.AdapterTrainer(model=adapted, args=settings, train_dataset=data)
    trainer.train()
    again = bone_fx.adapt(model, adapter, inputs()).train()
    assert losses(trainer) == pytest.approx(plain(again, data), rel=1e-4)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = bone_fx.adapt(model.eval(), tmp_path / "saved", inputs())
    for name in trained:
        assert torch.equal(loaded.get_parameter(name), adapted.get_parameter(name))
        if "bone_block" not in name:
            assert not torch.equal(adapted.get_parameter(name), model.get_parameter(name))


@pytest.mark.slow
def test_a_sequence_to_sequence_model_makes_its_decoder_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=96,
        d_model=48,
        d_ff=80,
        d_kv=16,
        num_layers=2,
        num_heads=3,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = T5ForConditionalGeneration(config)
    adapter = bone_fx.BoneConfig(r=16, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    data = rows(8)
    for row in data:
        row["labels"] = row["input_ids"].flip(0)[:5].clone()
    data[0]["labels"][3:] = -100

    def adapted() -> bone_fx.AdaptedModule:
        return bone_fx.adapt(model, adapter, batch_of(data)).train()

    settings = arguments(tmp_path, Seq2SeqTrainingArguments, per_device_train_batch_size=8)
    trainer = Seq2SeqTrainer(model=adapted(), args=settings, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert losses(trainer) == pytest.approx(plain(adapted(), data), rel=1e-4)
    assert trainer.evaluate()["eval_loss"] < losses(trainer)[0]


def test_accelerate_runs_the_plain_loop() -> None:
    from accelerate import Accelerator

    data = rows()
    adapted = adapted_llama()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(adapted.parameter_groups(), lr=RATE)
    prepared, optimizer = accelerator.prepare(adapted, optimizer)
    found = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = prepared(**batch_of(data)).loss
        accelerator.backward(loss)
        optimizer.step()
        found.append(float(loss.detach()))
    assert accelerator.unwrap_model(prepared) is adapted
    assert found == pytest.approx(plain(adapted_llama(), data), rel=1e-4)


@pytest.mark.parametrize("kind", [bone_fx.AdapterTrainer, *slow(Trainer)])
def test_labels_of_a_causal_model_shift_under_label_smoothing(
    kind: type[Trainer], tmp_path: Path
) -> None:
    adapted, data = adapted_llama(), rows(4)
    given = batch_of(data)
    labels = given.pop("labels")
    expected = LabelSmoother(epsilon=0.1)(adapted(**given), labels, shift_labels=True)
    trainer = kind(adapted, arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=data)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-4)


def test_question_answering_has_a_loss_in_evaluation(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = BertForQuestionAnswering(BertConfig(vocab_size=96, num_hidden_layers=1, **sizes))
    config = bone_fx.BoneConfig(r=8, target_modules=["query"])
    adapted = bone_fx.adapt(model, config, inputs())
    data = [
        {"input_ids": row["input_ids"], "start_positions": torch.tensor(1)}
        | {"attention_mask": row["attention_mask"], "end_positions": torch.tensor(3)}
        for row in rows(4)
    ]
    trainer = bone_fx.AdapterTrainer(adapted, arguments(tmp_path), eval_dataset=data)
    with torch.no_grad():
        expected = model.eval()(**batch_of(data)).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_noise_on_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neftune"):
        bone_fx.AdapterTrainer(adapted_llama(), arguments(tmp_path, neftune_noise_alpha=5.0))
