"""The loss on output and labels against the model's own forward with labels."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

from bone_fx.capture.training.capture_training import capture_training
from bone_fx.capture.training.loss import loss_for
from bone_fx.errors import UsageError
from tests.capture.architectures import ARCHITECTURES, BY_NAME, VOCABULARY, Architecture
from tests.tiers import slow

_BERT = BY_NAME["bert"].config
_LLAMA = BY_NAME["llama"].config
_WITHOUT = {"wav2vec2"}
"""CTC needs the lengths of the audio."""


def _tokens(batch: int, length: int) -> torch.Tensor:
    labels = torch.randint(
        3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3)
    )
    labels[0, : max(1, length // 3)] = -100
    return labels


@pytest.mark.parametrize(
    "row", [r for r in ARCHITECTURES if r.name not in _WITHOUT], ids=lambda row: row.name
)
def test_table_equals_forward(row: Architecture) -> None:
    model = row.build()
    inputs = row.inputs(3, 12)
    loss = loss_for(model)
    assert loss is not None
    if "pixel_values" in inputs:
        labels = torch.tensor([0, 4, 2])
    else:
        labels = _tokens(*inputs.get("decoder_input_ids", inputs.get("input_ids")).shape)
    with torch.no_grad():
        expected = model(**inputs, labels=labels)
        output = model(**inputs)
    config = copy.deepcopy(model.config.to_dict())
    torch.testing.assert_close(loss(output, labels), expected.loss, rtol=1e-6, atol=1e-6)
    assert model.config.to_dict() == config
    attached = loss.attach(output, labels)
    assert type(attached) is type(expected)
    assert [k for k in attached if k != "past_key_values"] == [
        k for k in expected if k != "past_key_values"
    ]
    again = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
    assert torch.equal(again(output, labels), loss(output, labels))


_HEADS: tuple[tuple[str, dict[str, Any], torch.Tensor], ...] = (
    ("BertForSequenceClassification", {**_BERT, "num_labels": 3}, torch.tensor([0, 2])),
    ("BertForSequenceClassification", {**_BERT, "num_labels": 1}, torch.tensor([0.5, 2.0])),
    ("BertForSequenceClassification", {**_BERT, "num_labels": 3}, torch.rand(2, 3)),
    (
        "BertForSequenceClassification",
        {**_BERT, "num_labels": 3, "problem_type": "regression"},
        torch.rand(2, 3),
    ),
    ("LlamaForSequenceClassification", {**_LLAMA, "num_labels": 3}, torch.tensor([0, 2])),
    ("LlamaForSequenceClassification", {**_LLAMA, "num_labels": 1}, torch.tensor([0.5, 2.0])),
    ("LlamaForSequenceClassification", {**_LLAMA, "num_labels": 3}, torch.rand(2, 3)),
    (
        "LlamaForTokenClassification",
        {**_LLAMA, "num_labels": 3},
        torch.tensor([[0, 2, -100, 1, 1]] * 2),
    ),
    (
        "BertForTokenClassification",
        {**_BERT, "num_labels": 3},
        torch.tensor([[0, 2, -100, 1, 1]] * 2),
    ),
    (
        "DebertaV2ForSequenceClassification",
        {**BY_NAME["deberta-v2"].config, "num_labels": 3},
        torch.tensor([0, 2]),
    ),
    ("BertForNextSentencePrediction", _BERT, torch.tensor([0, 1])),
    ("BertLMHeadModel", {**_BERT, "is_decoder": True}, torch.tensor([[3, 4, -100, 5, 6]] * 2)),
    ("BartForCausalLM", BY_NAME["bart"].config, torch.tensor([[3, 4, -100, 5, 6]] * 2)),
)


@pytest.mark.parametrize(("name", "config", "labels"), _HEADS)
def test_heads_equal_forward(name: str, config: dict[str, Any], labels: torch.Tensor) -> None:
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**config)).eval()
    inputs = {"input_ids": torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])}
    loss = loss_for(model)
    assert loss is not None
    with torch.no_grad():
        ours = loss(model(**inputs), labels)
        expected = model(**inputs, labels=labels).loss
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["BertForQuestionAnswering", "LlamaForQuestionAnswering"])
def test_question_answering_takes_two_positions(name: str) -> None:
    model_class = getattr(transformers, name)
    model = model_class(
        model_class.config_class(**(_BERT if name.startswith("Bert") else _LLAMA))
    ).eval()
    inputs = {"input_ids": torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])}
    labels = {"start_positions": torch.tensor([1, 9]), "end_positions": torch.tensor([2, 3])}
    loss = loss_for(model)
    assert loss is not None
    with torch.no_grad():
        torch.testing.assert_close(loss(model(**inputs), labels), model(**inputs, **labels).loss)
    with pytest.raises(UsageError, match="end_positions"):
        loss(model(**inputs), labels["start_positions"])


def test_router_loss_and_number_of_items() -> None:
    model = BY_NAME["mixtral"].build(output_router_logits=True)
    inputs = BY_NAME["mixtral"].inputs(3, 12)
    labels = _tokens(3, 12)
    loss = loss_for(model)
    assert loss is not None
    with torch.no_grad():
        output = model(**inputs)
        assert output.aux_loss is not None
        ours = loss(output, labels, num_items_in_batch=5)
        torch.testing.assert_close(ours, model(**inputs, labels=labels, num_items_in_batch=5).loss)


def test_subclass_with_another_name_has_its_parents_loss() -> None:
    class Meadow(transformers.LlamaForCausalLM):
        pass

    model = Meadow(transformers.LlamaConfig(**_LLAMA)).eval()
    inputs, labels = BY_NAME["llama"].inputs(2, 7), _tokens(2, 7)
    loss = loss_for(model)
    assert loss is not None
    with torch.no_grad():
        torch.testing.assert_close(
            loss(model(**inputs), labels), model(**inputs, labels=labels).loss
        )


class _Llama(transformers.LlamaForCausalLM):
    """Passes all on, so that its own code does not say what its loss is."""

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        return super().forward(input_ids, attention_mask=attention_mask, labels=labels)


class _Doubled(_Llama):
    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        output = super().forward(input_ids, attention_mask, labels)
        if labels is not None:
            output.loss = 2 * output.loss
        return output


class _Smoothed(_Llama):
    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        output = super().forward(input_ids, attention_mask)
        if labels is not None:
            logits, target = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            output["loss"] = functional.cross_entropy(logits, target, label_smoothing=0.1)
        return output


class _Weighted(transformers.BertForSequenceClassification):
    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        output = super().forward(input_ids, attention_mask)
        if labels is not None:
            weight = torch.tensor([1.0, 5.0, 1.0])
            output["loss"] = functional.cross_entropy(output.logits, labels, weight=weight)
        return output


def test_a_forward_that_passes_labels_on_has_its_parents_loss() -> None:
    model = _Llama(transformers.LlamaConfig(**_LLAMA)).eval()
    inputs, labels = BY_NAME["llama"].inputs(2, 7), _tokens(2, 7)
    capture = capture_training(model, inputs)
    assert capture.loss is not None
    with torch.no_grad():
        expected = model(**inputs, labels=labels).loss
        torch.testing.assert_close(capture.loss(model(**inputs), labels), expected)


@pytest.mark.parametrize("model_class", [_Weighted, *slow(_Doubled, _Smoothed)])
def test_a_loss_that_the_forward_changes_is_not_taken_for_its_parents(model_class: Any) -> None:
    fields = _BERT | {"num_labels": 3} if model_class is _Weighted else _LLAMA
    model = model_class(model_class.config_class(**fields)).eval()
    config, state = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    capture = capture_training(model, {"input_ids": torch.tensor([[3, 4, 5, 6], [8, 9, 10, 2]])})
    assert capture.loss is None
    assert "it computes another one" in capture.notes[0]
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)


def test_a_function_that_borrows_a_name_is_not_taken_in_chunks() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    @functools.wraps(ForCausalLMLoss)
    def doubled(*args: Any, **options: Any) -> Any:
        return 2 * ForCausalLMLoss(*args, **options)

    model = BY_NAME["llama"].build()
    loss = loss_for(model)
    assert loss is not None
    assert loss.takes_head_inputs
    model.loss_function = doubled
    loss = loss_for(model)
    assert loss is not None
    assert loss.function is doubled
    assert not loss.takes_head_inputs


def test_no_loss_where_none_is_known() -> None:
    assert loss_for(torch.nn.Linear(2, 2)) is None
    assert loss_for(BY_NAME["wav2vec2"].build()) is None
    sizes = {"hidden_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1}
    config = transformers.ProphetNetConfig(vocab_size=32, max_position_embeddings=16, **sizes)
    assert loss_for(transformers.ProphetNetForConditionalGeneration(config)) is None
    assert loss_for(transformers.BertModel(transformers.BertConfig(**_BERT))) is None
