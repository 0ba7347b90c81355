"""int4 for CUDA: the weight-only kernels take every product, or the manifest says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

import bone_fx
from bone_fx.runtime.session import open_session
from tests.end_to_end.tiny import tiny_base, tiny_tokenizer
from tests.tiers import slow

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
}
PRODUCTS = 5  # q with k and v, o, gate, up, down: and the head
KEYS = ("ep.cuda.fpa_intb_gemm", "session.use_device_allocator_for_initializers")


def exported(folder: Path, choices: dict[str, Any], **sizes: Any) -> bone_fx.ExportResult:
    base = tiny_base(folder / "base", **{**SIZES, **sizes})
    tiny_tokenizer(base)
    choices = {"dtype": "int4", "provider": "cuda", "verify_on": "cpu", **choices}
    return bone_fx.export(base, output=folder / "out", **choices)


def products_of(folder: Path) -> list[tuple[dict[str, int], list[str], onnx.GraphProto]]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return [
        ({a.name: a.i for a in node.attribute}, list(node.input), graph)
        for node in graph.node
        if node.op_type == "MatMulNBits"
    ]


def session_keys(folder: Path) -> dict[str, str]:
    content = json.loads((folder / "genai_config.json").read_text())
    options = content["model"]["decoder"]["session_options"]
    return {key: value for key, value in options.items() if "." in key}


@pytest.mark.parametrize("tied", [True, *slow(False)])
def test_every_product_fits_by_default(tied: bool, tmp_path: Path) -> None:
    result = exported(tmp_path, {}, tie_word_embeddings=tied)
    found = products_of(tmp_path / "out")
    assert len(found) == PRODUCTS + 1
    assert sorted(attributes["bits"] for attributes, _, _ in found) == [4] * PRODUCTS + [8]
    for attributes, inputs, graph in found:
        dtypes = {i.name: i.data_type for i in graph.initializer}
        assert len(inputs) == 3  # no zero points, no g_idx, no bias
        assert dtypes[inputs[1]] == onnx.TensorProto.UINT8
        assert dtypes[inputs[2]] == onnx.TensorProto.FLOAT16
        assert attributes["block_size"] == 32
        assert attributes["N"] % (64 if attributes["bits"] == 4 else 32) == 0
        assert attributes["K"] % 32 == 0
    quantization = result.manifest["quantization"]
    assert quantization["weight_only"]["eligible"] == PRODUCTS + 1
    assert quantization["weight_only"]["refused"] == {}
    assert quantization["calibration"]["products"] == PRODUCTS
    assert len(quantization["gathered"]) == tied  # an embedding that is tied follows the head
    assert session_keys(tmp_path / "out") == dict.fromkeys(KEYS, "1")
    assert result.manifest["verification"]["figures"]["onnx_vs_written"] <= 2e-2
    assert not any("CUDA's" in note or "slow" in note for note in result.warnings)


def test_keys_for_cuda_do_not_keep_the_cpu_from_the_folder(tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    exported(tmp_path, {"verify": "off"})
    config = og.Config(str(tmp_path / "out"))
    config.clear_providers()
    parameters = og.GeneratorParams(model := og.Model(config))
    parameters.set_search_options(max_length=6, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens([5, 6, 7])
    while not generator.is_done():
        generator.generate_next_token()
    assert len(generator.get_sequence(0)) > 3
    assert open_session(tmp_path / "out" / "model.onnx").get_inputs()


def test_products_that_do_not_fit_are_named_with_the_reason(tmp_path: Path) -> None:
    result = exported(tmp_path, {"verify": "off"}, intermediate_size=160, vocab_size=136)
    found = result.manifest["quantization"]["weight_only"]
    mlp = "model.layers.0.mlp"
    assert found["refused"] == {
        f"{mlp}.gate_proj.weight": "160 outputs, no multiple of 64",
        f"{mlp}.up_proj.weight": "160 outputs, no multiple of 64",
        "lm_head.weight": "136 outputs, no multiple of 32",
    }
    assert found["eligible"] == 3
    assert session_keys(tmp_path / "out") == dict.fromkeys(KEYS, "1")
    assert sum("fast prefill" in note for note in result.warnings) == 2


def test_a_form_that_was_asked_for_wins_and_says_what_it_costs(tmp_path: Path) -> None:
    choices = {"verify": "off", "block_size": 16, "symmetric": False, "calibration": "none"}
    result = exported(tmp_path, choices)
    found = result.manifest["quantization"]
    assert (found["weights"]["block_size"], found["weights"]["symmetric"]) == (16, False)
    assert found["weight_only"]["eligible"] == 0
    assert session_keys(tmp_path / "out") == {}
    assert any("blocks of 16" in note and "prefill" in note for note in result.warnings)
