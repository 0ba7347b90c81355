"""GGUF files: dequantized once, bit for bit what the format says, and refused when broken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Starcoder2Config

from bone_fx.base.loading import open_base, skeleton
from bone_fx.base.sizes.gguf_values import unread_values
from bone_fx.base.unused_tensors import account_for_unused
from bone_fx.errors import BaseModelError
from bone_fx.weights.load_plan import recipes_for
from tests.capture.architectures import BY_NAME, VOCABULARY

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def _name(name: str) -> str:
    parts = name.removeprefix("model.").removesuffix(".weight")
    if parts in _TOP:
        return f"{_TOP[parts]}.weight"
    _, layer, rest = parts.split(".", 2)
    return f"blk.{layer}.{_NAMES[rest]}.weight"


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows in llama.cpp's order: rotary pairs next to each other."""
    out_features, in_features = weight.shape
    halves = weight.view(heads, 2, out_features // heads // 2, in_features)
    return halves.transpose(1, 2).reshape(out_features, in_features)


def _write(
    file: Path,
    merge: str = "! #",
    extra: Mapping[str, Any] = MappingProxyType({}),
    more: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """A tiny Llama as GGUF, matrices in Q8_0; gives back what it dequantizes to, by HF name."""
    gguf = pytest.importorskip("gguf")
    model = BY_NAME["llama"].build()
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if None not in more.values():
        writer.add_layer_norm_rms_eps(1e-6)
    for key, value in more.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_float32(key, value)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["!#", *(chr(33 + i) for i in range(VOCABULARY - 1))])
    writer.add_token_merges([merge])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    expected = {}
    quantized = gguf.GGMLQuantizationType.Q8_0
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        rotary = heads.get(name.split(".")[-2])
        if values.dim() == 1:
            writer.add_tensor(_name(name), values.numpy())
            expected[name] = values
            continue
        rows = values if rotary is None else _interleaved(values, rotary)
        blocks = gguf.quants.quantize(np.ascontiguousarray(rows.numpy()), quantized)
        writer.add_tensor(_name(name), blocks, raw_dtype=quantized)
        stored = torch.from_numpy(gguf.quants.dequantize(blocks, quantized).copy())
        expected[name] = stored
        if rotary is not None:  # back to the halves that HF rotates
            out_features, in_features = stored.shape
            pairs = stored.view(rotary, out_features // rotary // 2, 2, in_features)
            expected[name] = pairs.transpose(1, 2).reshape(out_features, in_features)
    for name, values in extra.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_dequantized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("BONE_FX_CACHE", str(cache))
    (tmp_path / "base").mkdir()
    expected = _write(tmp_path / "base" / "tiny.gguf")
    base = open_base(tmp_path / "base")
    assert [path.name for path in cache.iterdir()] == [base.folder.name]
    assert base.architecture.__name__ == "LlamaForCausalLM"
    assert (base.folder / "tokenizer.json").is_file()
    before = base.files[0].stat().st_mtime_ns
    assert open_base(tmp_path / "base" / "tiny.gguf").folder == base.folder
    assert base.files[0].stat().st_mtime_ns == before
    model, plan = skeleton(base, torch.float32)
    recipes = recipes_for(model, plan, base.tensors)
    assert {name for name, _ in model.named_parameters()} == set(expected)
    for name, values in expected.items():
        assert torch.equal(recipes[name].evaluate(), values), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF"),
        (b"PK\3\4 etc", "not a GGUF"),
        (b"GGUF" + b"\0" * 60, "dequantized"),
        (b"GGUF\3\0\0\0" + b"\xff" * 60, "dequantized"),
    ],
)
def test_broken_files(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(BaseModelError, match=message):
        open_base(file, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_a_truncated_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    _write(file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(BaseModelError, match="dequantized"):
        open_base(file, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("name", ["blk.1.attn_q.weight", "output_norm.weight", "token_embd.weight"])
def test_a_file_that_lacks_a_tensor(name: str, tmp_path: Path) -> None:
    """transformers would fill it with random values."""
    file = tmp_path / "model.gguf"
    _write(file)
    content = file.read_bytes()
    assert content.count(name.encode()) == 1
    file.write_bytes(content.replace(name.encode(), name.replace("weight", "weighX").encode()))
    with pytest.raises(BaseModelError, match="does not hold the whole model"):
        open_base(file, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_a_tensor_that_transformers_does_not_read(tmp_path: Path) -> None:
    file, extra = tmp_path / "model.gguf", ("blk.1.ffn_up.bias", "output.bias", "rope_freqs.weight")
    _write(file, extra={name: np.full(4, 2.0, np.float32) for name in extra})
    for _ in range(2):  # the second time from the cache
        base = open_base(file, cache_dir=tmp_path / "cache")
        assert base.unread == extra
    shell = skeleton(base, torch.float32)
    with pytest.raises(BaseModelError, match=r"3 tensors .* does not take blk\.1\.ffn_up\.bias"):
        account_for_unused(*shell, base.tensors, unread=base.unread)
    assert account_for_unused(*shell, base.tensors, extra, base.unread) == [
        "left out as allowed: blk.1.ffn_up.bias, output.bias, rope_freqs.weight of the base"
    ]


@pytest.mark.parametrize(
    ("values", "lost"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, 2),
        ({"llama.rope.scaling.type": "yarn"}, 1),
        ({"llama.attention.sliding_window": 7.0}, 1),
        ({"llama.final_logit_softcapping": 30.0, "llama.residual_scale": 0.5}, 2),
        ({"llama.something_new": 3.0}, 1),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}, 0),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, 0),
        ({"llama.attention.sliding_window": 0.0, "llama.logit_scale": 1.0}, 0),
        ({"llama.attention.key_length": 16.0, "general.file_type": 7.0}, 0),
    ],
)
def test_values_that_transformers_does_not_read(
    values: dict[str, Any], lost: int, tmp_path: Path
) -> None:
    """Scaled positions, windows, caps: transformers drops what is not in its tables."""
    file = tmp_path / "model.gguf"
    _write(file, more=values)
    base = open_base(file, cache_dir=tmp_path / "cache")
    assert base.unread == (tuple(values) if lost else ())
    shell = skeleton(base, torch.float32)
    if not lost:
        return
    first = re.escape(next(iter(values)))
    with pytest.raises(BaseModelError, match=f"{first}, which transformers does not read"):
        account_for_unused(*shell, base.tensors, unread=base.unread)
    (note,) = account_for_unused(*shell, base.tensors, list(values), base.unread)
    assert note == f"left out as allowed: {', '.join(sorted(values))} of the base"


def test_values_that_the_configuration_says_by_default() -> None:
    theta, name = Starcoder2Config().to_dict(), "starcoder2.rope.freq_base"
    values = {"general.architecture": "starcoder2", name: theta["rope_parameters"]["rope_theta"]}
    assert unread_values(values, theta) == []
    assert unread_values({**values, name: 999999.4}, theta) == [name]


def test_a_file_that_says_nothing_of_its_norms(tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", more={"llama.attention.layer_norm_rms_epsilon": None})
    with pytest.raises(BaseModelError, match="norms"):
        open_base(tmp_path / "model.gguf", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("merge", ["# !", "! $"], ids=["an exception", "a panic"])
def test_a_tokenizer_that_cannot_be_read(
    merge: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path / "model.gguf", merge=merge)
    base = open_base(tmp_path / "model.gguf", cache_dir=tmp_path / "cache")
    assert not (base.folder / "tokenizer.json").exists()
    assert "no tokenizer" in caplog.text


def test_which_of_several(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(BaseModelError, match="several GGUF"):
        open_base(tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(BaseModelError, match="BONE_FX_CACHE"):
        open_base(tmp_path / "model.gguf", cache_dir=tmp_path / "cache")
