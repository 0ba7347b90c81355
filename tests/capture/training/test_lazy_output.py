"""Logits of an output that are formed when they are read, whichever way."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import CausalLMOutputWithPast

from bone_fx.capture.training.lazy_output import with_lazy_logits
from bone_fx.errors import UsageError

LOSS, LOGITS = torch.tensor(2.0), torch.arange(6.0).view(2, 3)


def lazy(calls: list[str]) -> Any:
    """An output that notes when its logits are formed."""

    def form() -> Tensor:
        calls.append("formed")
        return LOGITS

    return with_lazy_logits(CausalLMOutputWithPast(loss=LOSS, logits=torch.empty(0)), form)


READERS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda y: y.logits,
    "getattr": lambda y: getattr(y, "logits", None),
    "key": lambda y: y["logits"],
    "index": lambda y: y[1],
    "slice": lambda y: y[1:][0],
    "tuple": lambda y: y.to_tuple()[1],
    "get": lambda y: y.get("logits"),
    "values": lambda y: list(y.values())[1],
    "items": lambda y: dict(y.items())["logits"],
    "dict": lambda y: dict(y)["logits"],
    "stars": lambda y: {**y}["logits"],
    "class": lambda y: CausalLMOutputWithPast(**y).logits,
    "copy": lambda y: copy.copy(y).logits,
    "deepcopy": lambda y: copy.deepcopy(y).logits,
    "pickle": lambda y: pickle.loads(pickle.dumps(y)).logits,
    "pytree": lambda y: pytree.tree_leaves(y)[1],
    "pytree map": lambda y: pytree.tree_map(lambda tensor: tensor, y).logits,
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_finds_them(reader: str) -> None:
    calls: list[str] = []
    output = lazy(calls)
    for _ in range(2):
        assert torch.equal(READERS[reader](output), LOGITS)
    assert calls == ["formed"]
    assert type(output) is CausalLMOutputWithPast
    assert list(output) == ["loss", "logits"]


def test_the_loss_alone_forms_nothing() -> None:
    calls: list[str] = []
    output = lazy(calls)
    assert isinstance(output, CausalLMOutputWithPast)
    assert "loss" in output
    assert "logits" in output
    assert list(output) == ["loss", "logits"]
    assert output.loss is output["loss"] is output[0] is LOSS
    assert not calls
    assert "2., " not in repr(output).partition("logits=")[0]
    assert calls == ["formed"]


def test_what_is_set_stays() -> None:
    calls: list[str] = []
    by_attribute, by_key = lazy(calls), lazy(calls)
    by_attribute.logits = LOSS
    by_key["logits"] = LOSS
    assert by_attribute.logits is by_key.logits is LOSS
    by_attribute.loss = LOGITS
    assert by_attribute["loss"] is LOGITS


def test_a_refusal_is_said_at_every_read() -> None:
    def refuse() -> Tensor:
        raise UsageError("the head's weight was changed")

    output = with_lazy_logits(CausalLMOutputWithPast(loss=LOSS, logits=torch.empty(0)), refuse)
    for _ in range(2):
        with pytest.raises(UsageError, match="was changed"):
            _ = output.logits
    assert output.loss is LOSS
