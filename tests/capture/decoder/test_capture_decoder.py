"""A decoder captured without weights is its model, row by row, in ONNX Runtime."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from torch import nn

from bone_fx.capture.decoder.capture_decoder import capture_decoder
from bone_fx.capture.decoder.lower_program import lower
from bone_fx.errors import CaptureError
from bone_fx.onnx.placement import place
from tests.capture.architectures import BY_NAME
from tests.capture.decoder.decoders import CORE, DECODERS, Decoder
from tests.capture.decoder.decoding import (
    Generation,
    capture_of,
    captured,
    captured_onnx,
    captured_session,
    differences,
    onnx_of,
    session_of,
    skeleton_of,
    texts,
)
from tests.tiers import slow, tiered

TOLERANCE = 1e-5
ROW = {row.name: row for row in DECODERS}


# In the scope of the session all tests of a row follow one another: one process captures it.
@pytest.mark.parametrize("row", tiered(DECODERS, CORE), scope="session")
def test_decoder_equals_the_model_on_ragged_texts(row: Decoder) -> None:
    model, capture = captured(row.name)
    translated = captured_onnx(row.name)
    found = differences(model, capture, captured_session(row.name))
    assert max(found.values()) <= TOLERANCE, found
    assert [layer.window for layer in capture.layers] == list(row.windows)
    assert capture.norms == row.norms
    operators = Counter(node.op_type for node in translated.graph)
    assert operators["GroupQueryAttention"] == (2 if row.fused else 0)
    assert operators["RotaryEmbedding"] == 2 * row.rotary.count("outside")
    turned = [
        n.attributes.get_int("do_rotary", 0)
        for n in translated.graph
        if n.op_type == "GroupQueryAttention"
    ]
    assert turned == [int(kind == "inside") for kind in row.rotary if row.fused]
    assert capture.share_buffer == row.fused
    without = {operator for operator, _ in place(translated).missing.values()}
    assert without <= {"com.microsoft::GroupQueryAttention"}, "the only one without fp32 on CUDA"
    logits = model(input_ids=texts(99)[1][None]).logits
    assert float(logits.detach().std()) > 0.5, "logits that hardly differ would hide an error"


@pytest.mark.parametrize("name", ["mistral", "mistral_head_20", *slow("gemma2")])
def test_a_window_wider_by_one_is_seen(name: str) -> None:
    model = ROW[name].build()
    wider = ROW[name].build(sliding_window=7)
    capture = capture_of(wider)
    found = differences(model, capture, session_of(onnx_of(capture, model)))
    assert min(found["prefill"], found["decode"]) > 1e-2


def test_gemmas_norms_keep_float32_in_bf16() -> None:
    model = ROW["gemma"].build()
    bf16 = capture_of(model, torch.bfloat16)
    assert {derived.dtype for derived in bf16.derived.values()} == {torch.float32}
    nodes = [n for n in onnx_of(bf16, model).graph if n.op_type.endswith("LayerNormalization")]
    before = [node.inputs[0].producer() for node in nodes]
    after = [[use.node.op_type for use in node.outputs[0].uses()] for node in nodes]
    assert [node.op_type for node in before if node is not None] == ["Cast"] * len(nodes)
    assert after == [["Cast"]] * len(nodes)
    fp16 = capture_of(model, torch.float16)
    assert {derived.dtype for derived in fp16.derived.values()} == {torch.float16}


def test_gemma3_has_a_table_for_each_kind_of_layer() -> None:
    capture = captured("gemma3_text").capture
    assert {"cos_cache", "sin_cache", "cos_cache_1", "sin_cache_1"} <= set(capture.constants)
    assert capture.derived["model.norm.weight_plus_one"].source == "model.norm.weight"


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "bloom"),
        *slow("gemma2", "gpt_neox_quarter", "gpt2", "llama_head_20", "phi3", "falcon_alibi"),
    ],
)
def test_half_precision_is_captured_in_half_precision(name: str) -> None:
    model = ROW[name].build()
    capture = capture_of(model, torch.float16)
    assert all(t.dtype is torch.float16 for name, t in capture.constants.items() if "cache" in name)
    found = differences(model, capture, session_of(onnx_of(capture, model.half().float())))
    assert max(found.values()) < 3e-2, found


def test_no_weight_is_read_and_the_model_is_left_as_it_was() -> None:
    model = skeleton_of(ROW["gemma3_text"].build())
    before = {name: (type(m), dict(vars(m)), set(m._buffers)) for name, m in model.named_modules()}
    config = model.config.to_dict(), model.config._attn_implementation
    first = capture_decoder(model)
    assert (model.config.to_dict(), model.config._attn_implementation) == config
    for name, module in model.named_modules():
        kind, attributes, buffers = before[name]
        assert type(module) is kind
        assert set(vars(module)) == set(attributes)
        assert set(module._buffers) == buffers
    again = capture_decoder(model)
    assert str(again.program.graph) == str(first.program.graph)


def test_nothing_global_is_left_behind() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama import modeling_llama

    before = (
        list(ALL_ATTENTION_FUNCTIONS),
        list(ALL_MASK_ATTENTION_FUNCTIONS),
        dict(vars(modeling_llama)),
    )
    capture_of(ROW["llama"].build())
    capture_of(ROW["bloom"].build())
    other = BY_NAME["gemma3_text"].build(use_bidirectional_attention=True)
    with pytest.raises(CaptureError):
        capture_decoder(skeleton_of(other))
    assert before == (
        list(ALL_ATTENTION_FUNCTIONS),
        list(ALL_MASK_ATTENTION_FUNCTIONS),
        dict(vars(modeling_llama)),
    )


def test_a_subclass_with_other_names_goes_through_unchanged() -> None:
    from transformers import LlamaForCausalLM

    class Alpaca(LlamaForCausalLM):
        pass

    model = ROW["llama"].build()
    other = Alpaca(model.config)
    other.load_state_dict(model.state_dict())
    capture = capture_of(other.eval())
    assert (
        max(differences(model, capture, session_of(onnx_of(capture, other))).values()) <= TOLERANCE
    )


def test_names_and_axes_are_those_of_onnxruntime_genai() -> None:
    translated = captured_onnx("llama")
    shapes = {v.name: str(v.shape) for v in (*translated.graph.inputs, *translated.graph.outputs)}
    assert shapes["input_ids"] == "[batch_size,sequence_length]"
    assert shapes["attention_mask"] == "[batch_size,total_sequence_length]"
    assert shapes["past_key_values.1.value"] == "[batch_size,2,past_sequence_length,16]"
    assert shapes["logits"] == "[batch_size,sequence_length,99]"
    assert shapes["present.0.key"] == "[batch_size,2,total_sequence_length,16]"


def test_a_norm_between_rotary_and_attention_keeps_both() -> None:
    from transformers import HunYuanDenseV1Config, HunYuanDenseV1ForCausalLM

    config = HunYuanDenseV1Config(**{**BY_NAME["qwen3"].config, "head_dim": 16})
    torch.manual_seed(0)
    model = HunYuanDenseV1ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    capture = capture_of(model)
    translated = onnx_of(capture, model)
    assert Counter(n.op_type for n in translated.graph)["RotaryEmbedding"] == 4
    assert max(differences(model, capture, session_of(translated)).values()) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "neither causal"),
    ],
)
def test_what_would_be_wrong_is_refused(name: str, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(CaptureError, match=reason):
        capture_decoder(skeleton_of(BY_NAME[name].build(**changes)))


def test_a_configuration_may_leave_the_number_of_positions_open() -> None:
    model = skeleton_of(BY_NAME["llama"].build())
    # As in a configuration of code that came with a checkpoint, whose fields nobody checks.
    model.config.__dict__.update(max_position_embeddings=None, n_positions=None)
    assert capture_decoder(model).context_length is None
    model.config.n_positions = "2048"
    with pytest.raises(CaptureError, match="n_positions of LlamaConfig"):
        capture_decoder(model)


def test_dynamic_ntk_is_refused_beyond_the_length_where_angles_are_fixed() -> None:
    model = skeleton_of(ROW["llama_dynamic"].build())
    with pytest.raises(CaptureError, match="other angles for every length"):
        capture_decoder(model, context_length=110)
    assert capture_decoder(model, context_length=100).context_length == 100


def test_a_text_that_outgrows_the_short_factors_goes_on_as_the_model_does() -> None:
    model, capture = captured("phi3_longrope_short")
    run = Generation(captured_session("phi3_longrope_short"), capture, 1)
    tokens = texts(99, (21,))[0][None]
    cache = None
    for start, end in ((0, 19), (19, 20), (20, 21), (21, 24)):
        new = tokens[:, start:end]
        with torch.no_grad():
            expected = model(input_ids=new, past_key_values=cache, use_cache=True)
        cache = expected.past_key_values
        found = run(new, torch.ones_like(new))
        assert float((found - expected.logits).abs().max()) <= TOLERANCE, (start, end)
    with torch.no_grad():
        anew = model(input_ids=tokens).logits[:, -1]
    assert float((anew - expected.logits[:, -1]).abs().max()) > 1e-2, "the cache is of two kinds"


@pytest.mark.parametrize(
    "name", ["llama_dynamic", "phi3_longrope_short", *slow("phi3_longrope_long")]
)
def test_fixed_tables_serve_a_rotary_function_that_is_not_recognised(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ROW[name].build()
    space = sys.modules[type(model).__module__]
    turn = space.apply_rotary_pos_emb  # type: ignore[attr-defined]  # both modules have it
    monkeypatch.setattr(space, "apply_rotary_pos_emb", lambda q, k, *tables: turn(q, k, *tables))
    capture = capture_of(model)
    assert not any("cos_cache" in name for name in capture.constants)
    found = differences(model, capture, session_of(onnx_of(capture, model)))
    assert max(found.values()) <= TOLERANCE, found


WRITTEN_OUT = "written out for the test"


@pytest.mark.parametrize(
    ("name", "unfused"),
    [
        *(("bloom", None), ("falcon_new", WRITTEN_OUT)),  # with ALiBi, and with rotary embeddings
        *slow(("falcon_new", None), ("bloom", WRITTEN_OUT)),
        *slow(("falcon", WRITTEN_OUT), ("falcon_alibi", None)),
    ],
)
def test_attention_of_its_own_in_other_forms(name: str, unfused: str | None) -> None:
    size = {"hidden_size": 80} if unfused is None else {}
    model = ROW[name].build(**size)
    capture = capture_decoder(skeleton_of(model), unfused=unfused)
    assert all(layer.plain for layer in capture.layers)
    assert not capture.share_buffer
    found = differences(model, capture, session_of(onnx_of(capture, model)))
    assert max(found.values()) <= TOLERANCE, found


def test_repeated_heads_are_cached_as_the_model_caches_them() -> None:
    capture = captured("falcon_new").capture
    assert [(layer.heads, layer.kv_heads) for layer in capture.layers] == [(4, 4)] * 2


def test_alibi_of_another_slope_is_seen() -> None:
    model, capture = captured("bloom")
    space = sys.modules[type(model).__module__]
    slopes = space._get_alibi_slopes  # type: ignore[attr-defined]  # bloom has it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space, "_get_alibi_slopes", lambda *given: slopes(*given) * 1.1)
        steeper = capture_of(model)
    session = session_of(onnx_of(steeper, model))
    assert min(differences(model, capture, session).values()) > 1e-3
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space, "_get_alibi_slopes", lambda *given: slopes(*given) * 1.1)
        assert max(differences(model, steeper, session).values()) <= TOLERANCE


class Spoiled:
    """`torch.nn.functional` as a model's module sees it, with other scores."""

    def __init__(self, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.spoil = spoil

    def __getattr__(self, name: str) -> object:
        return getattr(torch.nn.functional, name)

    def softmax(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.nn.functional.softmax(self.spoil(x), **options)[..., : x.shape[-1]]


@pytest.mark.parametrize(
    "spoil",
    [
        *slow(lambda x: torch.where(x < -1e9, x, x.tanh())),
        lambda x: torch.cat([x, x[..., :1]], -1),
    ],
    ids=["tanh", "sink"],
)
def test_attention_that_is_something_else_is_written_out(
    spoil: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    model = ROW["bloom"].build()
    plain = captured_session("bloom")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[type(model).__module__], "F", Spoiled(spoil))
        capture = capture_of(model)
        found = differences(model, capture, session_of(onnx_of(capture, model)))
        assert max(found.values()) <= TOLERANCE, found
        assert min(differences(model, capture, plain).values()) > 1e-3


TABLE = torch.tensor([0.0, 1.5, -1.0, 0.5, 2.0, -0.5])


@pytest.mark.parametrize(
    "kind", ["a table of six keys", *slow("scores by the length", "a clamped mask")]
)
def test_attention_that_depends_on_how_a_text_is_cut_is_written_out(kind: str) -> None:
    """Its logits are others for other prompts and steps, so both sides are cut alike."""
    model = ROW["bloom"].build()
    plain_session = captured_session("bloom")
    space = sys.modules[type(model).__module__]
    mask = space.create_causal_mask  # type: ignore[attr-defined]  # bloom has it
    with pytest.MonkeyPatch.context() as patch:
        if kind == "a clamped mask":
            patch.setattr(space, "create_causal_mask", lambda **o: mask(**o).clamp(min=-2.0))
        elif kind == "a table of six keys":
            spoiled = Spoiled(lambda x: x + TABLE[torch.arange(x.shape[-1])])
            patch.setattr(space, "F", spoiled)
        else:
            patch.setattr(space, "F", Spoiled(lambda x: x * x.shape[2]))
        capture = capture_of(model)
        assert all(layer.plain for layer in capture.layers)
        session = session_of(onnx_of(capture, model))
        run, plain = (Generation(s, capture, 1) for s in (session, plain_session))
        tokens = texts(99, (6,))[0][None]
        cache, gaps, changes = None, [], []
        for start, end in ((0, 3), (3, 5), (5, 6)):
            new = tokens[:, start:end]
            with torch.no_grad():
                expected = model(input_ids=new, past_key_values=cache, use_cache=True)
            cache = expected.past_key_values
            gaps.append(float((run(new, torch.ones_like(new)) - expected.logits).abs().max()))
            plain_logits = plain(new, torch.ones_like(new))
            changes.append(float((plain_logits - expected.logits).abs().max()))
        assert max(gaps) <= TOLERANCE
        assert max(changes) > 1e-3
        if kind == "a table of six keys":
            with pytest.raises(InvalidArgument, match="index"):
                run(tokens[:, 6:7], torch.ones(1, 1, dtype=torch.long))


def test_a_module_without_a_configuration_is_refused() -> None:
    with pytest.raises(CaptureError, match="no configuration"):
        capture_decoder(nn.Linear(2, 2))


def test_lowering_twice_changes_nothing() -> None:
    capture = capture_of(ROW["phi"].build())
    before = str(capture.program.graph)
    lower(capture.program)
    assert str(capture.program.graph) == before


@pytest.mark.parametrize("name", ["llama", "bloom", *slow("gemma2")])
def test_logits_of_the_last_tokens_are_those_of_each_text(name: str) -> None:
    model = captured(name).model
    last = capture_of(model, last_token_logits=True)
    sessions = [captured_session(name), session_of(onnx_of(last, model))]
    lengths = [5, 2, 7]
    ids = torch.randint(0, 99, (3, 7)).numpy()
    mask = torch.tensor([[int(i < n) for i in range(7)] for n in lengths]).numpy()
    feeds = {"input_ids": ids, "attention_mask": mask}
    for value in sessions[0].get_inputs():
        if value.name.startswith("past"):
            shape = (3, value.shape[1], 0, value.shape[3])
            feeds[value.name] = torch.zeros(shape).numpy()
    (whole,), (cut,) = (session.run(["logits"], feeds) for session in sessions)
    assert cut.shape == (3, 1, whole.shape[2])
    for row, length in enumerate(lengths):
        assert abs(cut[row, 0] - whole[row, length - 1]).max() <= TOLERANCE
