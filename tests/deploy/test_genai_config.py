"""onnxruntime-genai runs the folder as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from bone_fx.base.loading import open_base
from bone_fx.deploy.companions.choice import choose_companions
from bone_fx.deploy.genai_config import genai_config, write_genai_folder
from bone_fx.errors import InputRefusedError
from tests.capture.decoder.decoders import DECODERS
from tests.capture.decoder.decoding import captured, onnx_of

og = pytest.importorskip("onnxruntime_genai")
ROW = {row.name: row for row in DECODERS}


@pytest.mark.parametrize(
    "name",
    ["llama", "mistral", "qwen2", "gemma3_text", "gpt2", "gpt_neox_quarter", "llama_head_20"],
)
def test_greedy_text_equals_transformers(name: str, tmp_path: Path) -> None:
    model = ROW[name].build()
    model.generation_config.eos_token_id = None
    capture = captured(name).capture
    ir.save(onnx_of(capture, model), tmp_path / "model.onnx")
    model.config.eos_token_id = 98
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").unlink()
    companions = choose_companions(tmp_path / "base")
    warnings = write_genai_folder(tmp_path, open_base(tmp_path / "base"), capture, companions)
    assert "no tokenizer.json" in warnings[0]

    prompt = torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model.generate(
            prompt, do_sample=False, max_new_tokens=12, eos_token_id=98, pad_token_id=0
        )
    parameters = og.GeneratorParams(loaded := og.Model(str(tmp_path)))
    parameters.set_search_options(max_length=expected.shape[1], do_sample=False)
    generator = og.Generator(loaded, parameters)
    generator.append_tokens(prompt.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0)) == expected[0].tolist()


def test_generation_config_has_precedence() -> None:
    model, capture = captured("llama")
    generation = {
        "eos_token_id": [7, 8],
        "temperature": 0.6,
        "top_k": 20,
        "do_sample": True,
        "top_p": None,
    }
    content = genai_config(model.config, capture, generation, provider="cuda")
    assert content["model"]["eos_token_id"] == [7, 8]
    assert content["model"]["pad_token_id"] == 0
    assert content["model"]["context_length"] == content["search"]["max_length"] == 100
    session = content["model"]["decoder"]["session_options"]
    assert session["provider_options"] == [{"cuda": {"enable_cuda_graph": "0"}}]
    search = content["search"]
    assert (search["temperature"], search["top_k"], search["do_sample"], search["top_p"]) == (
        0.6,
        20,
        True,
        1.0,
    )


def test_the_buffer_is_shared_unless_the_graph_concatenates() -> None:
    for name, shared in (("llama", True), ("llama_head_20", False)):
        model, capture = captured(name)
        search = genai_config(model.config, capture, {})["search"]
        assert search["past_present_share_buffer"] is shared


def test_missing_tokenizers_and_templates_are_named(tmp_path: Path) -> None:
    model, capture = captured("llama")
    base, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base)
    out.mkdir()
    checkpoint = open_base(base)

    def notes() -> list[str]:
        return write_genai_folder(out, checkpoint, capture, choose_companions(base))

    assert "no tokenizer.json" in notes()[0]
    (base / "tokenizer.json").write_text("{}")
    assert "no chat template" in notes()[0]
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert notes() == []
    names = ["genai_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in out.iterdir()) == names


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    model, capture = captured("llama")
    model.save_pretrained(tmp_path)
    checkpoint = open_base(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InputRefusedError, match=r"generation_config\.json"):
        write_genai_folder(tmp_path, checkpoint, capture, choose_companions(tmp_path))
