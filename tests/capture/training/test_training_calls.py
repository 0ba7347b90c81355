"""A capture is called like its model, whatever the examples were; the model stays as it was."""

from __future__ import annotations

import copy
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bone_fx.capture.training.capture_training import capture_training
from bone_fx.errors import CaptureError, InputRefusedError, UsageError
from bone_fx.passes.dropout import set_dropout
from tests.capture.architectures import BY_NAME
from tests.tiers import slow

LLAMA, BERT = BY_NAME["llama"], BY_NAME["bert"]


def _evaluation(capture: Any, model: torch.nn.Module, **inputs: Any) -> float:
    set_dropout(capture.graph_module, False)
    model.eval()
    with torch.no_grad():
        return (capture(**inputs).logits - model(**inputs).logits).abs().max().item()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("llama", (1, 1)), ("llama", (4, 4)), ("bert", (2, 2))),
        *slow(("llama", (1, 5)), ("llama", (2, 64)), ("bert", (1, 1))),
    ],
)
def test_example_of_any_size_gives_the_same_graph(name: str, shape: tuple[int, int]) -> None:
    row = BY_NAME[name]
    model = row.build()
    capture = capture_training(model, {"input_ids": torch.ones(shape, dtype=torch.long)})
    assert not capture.notes
    assert capture.input_names == ("input_ids", "attention_mask")
    for batch, length in ((1, 1), (1, 9), (3, 1), (3, 11)):
        assert _evaluation(capture, model, **row.inputs(batch, length)) <= 1e-6


@pytest.mark.parametrize("name", ["mistral", *slow("llama", "bert", "gemma2")])
def test_mask_of_ones_in_the_example_is_still_an_input(name: str) -> None:
    row = BY_NAME[name]
    model = row.build()
    ids = row.inputs(2, 7)["input_ids"]
    capture = capture_training(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    left = torch.ones(3, 8, dtype=torch.long)
    left[1, :3] = 0
    inputs = {"input_ids": row.inputs(3, 8)["input_ids"], "attention_mask": left}
    with torch.no_grad():
        expected = model(**inputs).logits
    set_dropout(capture.graph_module, False)
    got = capture(**inputs).logits
    assert (got - expected)[left.bool()].abs().max() <= 1e-6
    assert (capture(input_ids=inputs["input_ids"]).logits - got).abs().max() > 1e-3


def test_missing_mask_means_ones_and_labels_are_passed_over() -> None:
    model = LLAMA.build()
    inputs = LLAMA.inputs(2, 7)
    ids = inputs["input_ids"]
    capture = capture_training(model, {**inputs, "labels": ids, "use_cache": False})
    assert capture.input_names == ("input_ids", "attention_mask")
    assert capture.loss is not None
    set_dropout(capture.graph_module, False)
    output = capture(ids, labels=ids, use_cache=False, return_dict=True, num_items_in_batch=3)
    assert isinstance(output, transformers.modeling_outputs.CausalLMOutputWithPast)
    assert torch.equal(
        output.logits, capture(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    )
    assert capture.signature.labels_of(ids, labels=ids) == {"labels": ids}
    with torch.no_grad():
        expected = model(**inputs, labels=ids)
    torch.testing.assert_close(capture.loss.attach(capture(**inputs), ids).loss, expected.loss)


@pytest.mark.parametrize("rows", [3, *slow(1)])
def test_position_ids_are_an_input(rows: int) -> None:
    model = LLAMA.build()
    inputs = LLAMA.inputs(3, 8)
    positions = torch.arange(8).expand(rows, -1)
    capture = capture_training(model, {**inputs, "position_ids": positions})
    inputs = LLAMA.inputs(4, 6)
    assert _evaluation(capture, model, **inputs, position_ids=torch.arange(6)[None] + 5) <= 1e-6
    assert _evaluation(capture, model, **inputs, position_ids=torch.randint(0, 90, (4, 6))) <= 1e-6


def test_restarting_positions_without_a_mask_are_refused() -> None:
    model = LLAMA.build()
    ids = LLAMA.inputs(2, 6)["input_ids"]
    capture = capture_training(
        model, {"input_ids": ids, "position_ids": torch.arange(6)[None].expand(2, -1)}
    )
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, -1)
    with pytest.raises(InputRefusedError, match="restart"):
        capture(input_ids=ids, position_ids=packed)


def test_mask_of_four_dimensions() -> None:
    model = LLAMA.build()
    ids = LLAMA.inputs(2, 6)["input_ids"]
    causal = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
    capture = capture_training(model, {"input_ids": ids, "attention_mask": causal})
    blocks = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).bool().tril().expand(3, 1, 8, 8)
    assert (
        _evaluation(
            capture, model, input_ids=LLAMA.inputs(3, 8)["input_ids"], attention_mask=blocks
        )
        <= 1e-6
    )
    assert _evaluation(capture, model, input_ids=ids[:1], attention_mask=causal[:1]) <= 1e-6


def test_embeddings_as_input() -> None:
    model = LLAMA.build()
    capture = capture_training(model, {"inputs_embeds": torch.randn(1, 5, 64)})
    assert _evaluation(capture, model, inputs_embeds=torch.randn(2, 9, 64)) <= 1e-6


@pytest.mark.parametrize("name", ["bart", *slow("t5")])
def test_decoder_inputs_come_from_labels(name: str) -> None:
    row = BY_NAME[name]
    model = row.build()
    ids = row.inputs(1, 5)["input_ids"]
    capture = capture_training(model, {"input_ids": ids, "labels": ids[:, :4]})
    inputs = row.inputs(3, 9)
    labels = inputs.pop("decoder_input_ids")
    labels[0, 3:] = -100
    set_dropout(capture.graph_module, False)
    with torch.no_grad():
        expected = model(**inputs, labels=labels)
        got = capture(**inputs, labels=labels)
    assert capture.loss is not None
    assert (got.logits - expected.logits).abs().max() <= 1e-6
    torch.testing.assert_close(capture.loss(got, labels), expected.loss)


def test_flags_are_part_of_the_graph() -> None:
    model = LLAMA.build()
    inputs = LLAMA.inputs(2, 5)
    capture = capture_training(model, {**inputs, "output_hidden_states": True})
    assert len(capture(**inputs).hidden_states) == 3
    with pytest.raises(UsageError, match="output_hidden_states"):
        capture(**inputs, output_hidden_states=False)
    plain = capture_training(model, inputs)
    with pytest.raises(UsageError, match="output_hidden_states is not an input"):
        plain(**inputs, output_hidden_states=True)
    with pytest.raises(UsageError, match="return_dict"):
        plain(**inputs, return_dict=False)


def test_calls_that_do_not_fit_are_refused() -> None:
    capture = capture_training(BERT.build(), BERT.inputs(2, 5))
    ids = BERT.inputs(2, 7)["input_ids"]
    with pytest.raises(UsageError, match="lacks input_ids"):
        capture(attention_mask=torch.ones(2, 7))
    with pytest.raises(UsageError, match="token_type_ids is not an input"):
        capture(input_ids=ids, token_type_ids=ids)
    with pytest.raises(InputRefusedError, match="disagree about the size"):
        capture(input_ids=ids, attention_mask=torch.ones(2, 6, dtype=torch.long))
    with pytest.raises(InputRefusedError, match="disagree about the size called batch"):
        capture(input_ids=ids, attention_mask=torch.ones(3, 7, dtype=torch.float))
    with pytest.raises(InputRefusedError, match="dimensions"):
        capture(input_ids=ids[0], attention_mask=torch.ones(2, 7, dtype=torch.long))


@pytest.mark.parametrize(
    ("name", "longest"),
    [("roberta", 98), *slow(("bert", 100), ("gpt2", 100), ("opt", 100), ("bart", 100))],
)
def test_longer_than_the_learned_positions(name: str, longest: int) -> None:
    row = BY_NAME[name]
    model = row.build()
    capture = capture_training(model, row.inputs(2, 5))
    inputs = row.inputs(2, 5)
    inputs.pop("attention_mask")
    inputs["input_ids"] = torch.full((1, longest), 5)
    inputs = {key: value[:1] for key, value in inputs.items()}
    assert _evaluation(capture, model, **inputs) <= 1e-6
    inputs["input_ids"] = torch.full((1, longest + 1), 5)
    with pytest.raises(InputRefusedError, match=f"at most {longest}"):
        capture(**inputs)


def test_bfloat16_is_captured_in_bfloat16() -> None:
    model = LLAMA.build().to(torch.bfloat16)
    capture = capture_training(model, LLAMA.inputs(1, 5))
    inputs = LLAMA.inputs(3, 8)
    assert capture(**inputs).logits.dtype == torch.bfloat16
    assert _evaluation(capture, model, **inputs) == 0.0


@pytest.mark.parametrize("name", ["bert", *slow("llama", "whisper")])
def test_model_is_left_as_it_was(name: str) -> None:
    row = BY_NAME[name]
    model = row.build().train()
    next(iter(model.children())).eval()
    parameter = next(model.parameters()).requires_grad_(False)
    parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    config = model.config.to_dict()
    buffers = {key: (value, value.clone()) for key, value in model.named_buffers()}
    sdpa = torch.nn.functional.scaled_dot_product_attention
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    inputs = row.inputs(1, 5)
    before = copy.deepcopy(inputs)
    capture_training(model, inputs)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert torch.nn.functional.scaled_dot_product_attention is sdpa
    assert [module.training for module in model.modules()] == modes
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert model.config.to_dict() == config
    assert all(
        value is buffers[key][0] and torch.equal(value, buffers[key][1])
        for key, value in model.named_buffers()
    )
    assert not parameter.requires_grad
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[key], before[key]) for key in inputs)


def test_left_as_it_was_when_refused() -> None:
    model = BY_NAME["opt"].build(layerdrop=0.5)
    attributes = [set(module.__dict__) for module in model.modules()]
    with pytest.raises(CaptureError, match="layerdrop=0"):
        capture_training(model, BY_NAME["opt"].inputs(2, 5))
    assert not model.training
    assert model.config.use_cache
    assert [set(module.__dict__) for module in model.modules()] == attributes


@pytest.mark.parametrize(
    ("name", "overrides", "named"),
    [
        (
            "wav2vec2",
            {"apply_spec_augment": True, "mask_time_prob": 0.5},
            "apply_spec_augment=False",
        ),
        ("dinov2", {"drop_path_rate": 1e-6}, "drop_path_rate=0"),
        *slow(
            ("wav2vec2", {"layerdrop": 0.1}, "layerdrop=0"),
            ("mixtral", {"router_jitter_noise": 1e-6}, "router_jitter_noise=0"),
            (
                "whisper",
                {"apply_spec_augment": True, "mask_feature_prob": 1e-6},
                "apply_spec_augment=False",
            ),
            ("mixtral", {"experts_implementation": "eager"}, 'experts_implementation="grouped_mm"'),
        ),
    ],
)
def test_training_that_is_not_one_graph_is_refused(
    name: str, overrides: dict[str, Any], named: str
) -> None:
    row = BY_NAME[name]
    with pytest.raises(CaptureError) as caught:
        capture_training(row.build(**overrides), row.inputs(2, 12))
    assert named in str(caught.value)
    assert name == "mixtral" or "experts" not in str(caught.value)


def test_gradient_checkpointing_is_refused() -> None:
    model = LLAMA.build()
    model.activation_checkpointing_enable()
    with pytest.raises(CaptureError, match="activation_checkpointing_disable"):
        capture_training(model, LLAMA.inputs(2, 5))
    model.activation_checkpointing_disable()
    capture_training(model, LLAMA.inputs(2, 5))


def test_subclass_with_renamed_classes() -> None:
    class Sprout(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
        pass

    class Meadow(transformers.LlamaForCausalLM):
        def __init__(self, config: transformers.LlamaConfig) -> None:
            super().__init__(config)
            self.model.layers = torch.nn.ModuleList(
                Sprout(config, i) for i in range(config.num_hidden_layers)
            )

    torch.manual_seed(0)
    model = Meadow(transformers.LlamaConfig(**LLAMA.config)).eval()
    capture = capture_training(model, LLAMA.inputs(2, 5))
    assert capture.loss is not None
    assert _evaluation(capture, model, **LLAMA.inputs(3, 9)) == 0.0


def test_tied_parameter_is_read_under_the_name_of_its_user() -> None:
    model = BY_NAME["gemma"].build()
    capture = capture_training(model, BY_NAME["gemma"].inputs(2, 5))
    users = {
        node.target: [str(user.target) for user in node.users]
        for node in capture.graph_module.graph.find_nodes(op="get_attr")
        if node.target in ("lm_head.weight", "model.embed_tokens.weight")
    }
    assert users == {
        "lm_head.weight": ["aten.linear.default"],
        "model.embed_tokens.weight": ["aten.embedding.default"],
    }
    assert capture.graph_module.lm_head.weight is capture.graph_module.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama", *slow("t5", "falcon")])
def test_copies_stand_alone(name: str) -> None:
    row = BY_NAME[name]
    model = row.build()
    capture = capture_training(model, row.inputs(2, 5))
    set_dropout(capture.graph_module, False)
    copied = copy.deepcopy(capture)
    signature = pickle.loads(pickle.dumps(capture.signature))
    inputs = row.inputs(3, 7)
    with torch.no_grad():
        expected = capture(**inputs).logits.clone()
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(**inputs).logits, expected)
        assert torch.equal(signature.call(copied.graph_module, **inputs).logits, expected)
    assert list(copied.graph_module.state_dict()) == list(model.state_dict())


class _Own(torch.nn.Module):
    """Two inputs, batch norm, dropout, a flag, a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(
            torch.nn.Linear(50, 32), torch.nn.BatchNorm1d(32), torch.nn.Dropout(0.2)
        )
        self.head = torch.nn.Linear(32, 7)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x: torch.Tensor, table: torch.Tensor, twice: bool = False) -> dict[str, Any]:
        hidden = self.inner(x).relu() @ table
        return {"logits": self.head(hidden) * (self.scale if twice else 1), "hidden": (hidden,)}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("by_name", [False, True])
def test_own_module(rows: int, by_name: bool) -> None:
    torch.manual_seed(0)
    model = _Own()
    x, table = torch.randn(rows, 50), torch.randn(32, 32)
    capture = capture_training(
        model, {"x": x, "table": table, "twice": True} if by_name else (x, table, True)
    )
    assert not capture.notes
    assert capture.loss is None
    assert list(capture.graph_module.state_dict()) == list(model.state_dict())
    twin = copy.deepcopy(model).train()
    x = torch.randn(3, 50)
    for _ in range(2):
        torch.manual_seed(1)
        got = capture(x, table)
        torch.manual_seed(1)
        expected = twin(x, table, True)
        assert torch.equal(got["logits"], expected["logits"])
        assert torch.equal(got["hidden"][0], expected["hidden"][0])
    for name, value in twin.state_dict().items():
        assert torch.equal(value, capture.graph_module.state_dict()[name]), name
    set_dropout(capture.graph_module, False)
    twin.eval()
    assert torch.equal(capture(x[:1], table=table)["logits"], twin(x[:1], table, True)["logits"])
    assert model.inner[1].num_batches_tracked == 2
    with pytest.raises(InputRefusedError, match="fixed at 50"):
        capture(torch.randn(3, 49), table)
    with pytest.raises(UsageError, match="twice is part of the captured graph"):
        capture(x, table, False)


def test_own_module_of_any_number_of_tensors() -> None:
    class Sum(torch.nn.Module):
        def forward(self, *xs: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
            return sum(xs) + more["last"] if more else torch.stack(xs).sum(0)

    capture = capture_training(Sum(), (torch.ones(2, 3), torch.ones(2, 3)))
    assert torch.equal(capture(torch.ones(5, 3), torch.ones(5, 3)), torch.full((5, 3), 2.0))
    one = capture_training(torch.nn.Linear(3, 2), torch.ones(4, 3))
    assert one(torch.ones(1, 3)).shape == (1, 2)


def test_own_module_with_nested_inputs() -> None:
    class Pair(torch.nn.Module):
        def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return pair[0] * pair[1]

    capture = capture_training(Pair(), ((torch.ones(2, 3), torch.ones(2, 3)),))
    assert torch.equal(
        capture((torch.full((2, 3), 2.0), torch.full((2, 3), 3.0))), torch.full((2, 3), 6.0)
    )
    with pytest.raises(UsageError, match="nested otherwise"):
        capture([torch.ones(2, 3), torch.ones(2, 3)])


def test_own_module_of_a_fixed_batch_says_why() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(4, 6) if x.shape[0] == 4 else x

    capture = capture_training(Fixed(), (torch.randn(4, 6),))
    assert len(capture.notes) == 1
    assert "fixed" in capture.notes[0]
    with pytest.raises(InputRefusedError, match="fixed at 4"):
        capture(torch.randn(3, 6))


def test_sizes_that_take_another_path_are_refused() -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[0] % 2 == 0 else x

    capture = capture_training(Branching(), (torch.ones(4, 3),))
    assert torch.equal(capture(torch.ones(8, 3)), torch.full((8, 3), 2.0))
    for rows in (1, 3):
        with pytest.raises(InputRefusedError, match=r"x.shape\[0\] % 2"):
            capture(torch.ones(rows, 3))


def test_own_dynamic_shapes() -> None:
    length = torch.export.Dim("length", min=2, max=64)
    model = torch.nn.Linear(3, 2)
    capture = capture_training(model, (torch.randn(2, 5, 3),), dynamic_shapes=({1: length},))
    assert capture(torch.randn(2, 9, 3)).shape == (2, 9, 2)
    with pytest.raises(InputRefusedError, match="at most 64"):
        capture(torch.randn(2, 65, 3))
    with pytest.raises(InputRefusedError, match="fixed at 2"):
        capture(torch.randn(3, 9, 3))


def test_own_module_that_branches_on_its_mode_is_refused() -> None:
    class Noisy(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + 1 if self.training else x)

    with pytest.raises(CaptureError, match="evaluation mode"):
        capture_training(Noisy(3, 2), (torch.randn(2, 3),))


CALLS = {"made": 0, "odd": frozenset[int]()}


@torch.library.custom_op("bone_fx_tests::odd_at_times", mutates_args=())
def odd_at_times(x: torch.Tensor) -> torch.Tensor:
    """x, and in some calls x + 1."""
    CALLS["made"] += 1
    return x + 1 if CALLS["made"] in CALLS["odd"] else x.clone()


odd_at_times.register_fake(torch.empty_like)


class Odd(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = odd_at_times(super().forward(x))
        return y


@pytest.mark.parametrize(
    ("odd", "changed"),
    [
        # The model runs in the odd calls, its graph in the even ones.
        ({1}, ["model"]),
        ({2}, ["graph"]),
        ({1, 3}, []),
        ({2, 3}, ["model", "graph"]),
    ],
)
def test_one_odd_evaluation_refuses_a_model(
    odd: set[int], changed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CALLS, "made", 0)
    monkeypatch.setitem(CALLS, "odd", odd)
    with pytest.raises(CaptureError, match="differs by 1, allowed") as caught:
        capture_training(Odd(3, 2), (torch.randn(2, 3),))
    said = [who for who in ("model", "graph") if f"the {who} itself changes" in str(caught.value)]
    assert said == changed


def test_own_module_that_cannot_be_traced_is_refused() -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(CaptureError, match="Branching cannot be captured") as caught:
        capture_training(Branching(), (torch.randn(2, 3),))
    assert re.search(
        r"branches on the values of a tensor, at .*test_training_calls.py:\d+", str(caught.value)
    )
    assert "torch.where" in str(caught.value)


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda x: x if random.random() > 1e-9 else 0 * x, "random numbers outside of torch"),
        (lambda x: x if np.random.rand() > 1e-9 else 0 * x, "random numbers outside of torch"),
        (lambda x: x if torch.rand(()) > 1e-9 else 0 * x, "branches on the values of a tensor"),
        (lambda x: x + 1e-9 * torch.randn_like(x), "aten.randn_like.default in noise"),
    ],
    ids=["python", "numpy", "torch", "noise"],
)
def test_what_is_drawn_while_training_is_refused_however_improbable_or_small(
    draw: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    class Noise(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return draw(x) if self.training else x

    class Holder(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.noise = Noise()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.noise(x))

    with pytest.raises(CaptureError, match=said):
        capture_training(Holder(), (torch.randn(2, 3),))


def test_examples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="no argument words"):
        capture_training(torch.nn.Linear(3, 2), {"words": torch.ones(1, 3)})
    with pytest.raises(UsageError, match="1 positional"):
        capture_training(torch.nn.Linear(3, 2), (torch.ones(1, 3), torch.ones(1, 3)))
    with pytest.raises(UsageError, match="no tensor"):
        capture_training(torch.nn.Linear(3, 2), {})
    cache = transformers.DynamicCache()
    with pytest.raises(UsageError, match="past_key_values"):
        capture_training(LLAMA.build(), {**LLAMA.inputs(1, 4), "past_key_values": cache})


def test_own_module_does_not_import_transformers() -> None:
    program = (
        "import sys, torch; "
        "from bone_fx.capture.training.capture_training import capture_training; "
        "capture_training(torch.nn.Linear(3, 2), (torch.ones(2, 3),)); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
