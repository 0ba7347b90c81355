"""Graphs of large decoders without their weights, for `gpu_check.py --random` on another machine.

    python tools/shape_graphs.py llama-3.2-1b --dtype fp16 -o graphs/1b
    python tools/shape_graphs.py llama-3-8b --dtype int4 -o graphs/8b-int4 --last-token-logits

Writes model.onnx, which names a model.onnx.data of the right size, genai_config.json and where each
node runs on CUDA. No weight is read or made: 8B parameters take 12 s and 0.5 GB of memory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)

from bone_fx.base.skeleton import skeleton_from_config
from bone_fx.capture.decoder.capture_decoder import capture_decoder
from bone_fx.deploy.builds.base import cuda_placement
from bone_fx.deploy.builds.calibrate import Calibration
from bone_fx.deploy.builds.quantization import quantization_of, quantize
from bone_fx.deploy.genai_config import CONFIG_FILE, genai_config
from bone_fx.deploy.options import ExportOptions
from bone_fx.onnx.translate import translate
from bone_fx.onnx.writer import MODEL_FILE, graph_alone
from bone_fx.weights.recipes.recipe import Recipe, Value

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 48,
    "long_factor": [2.0] * 48,
    "original_max_position_embeddings": 4096,
}
SHAPES: dict[str, PreTrainedConfig] = {
    "tiny": LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "llama-3.2-1b": LlamaConfig(
        **(LLAMA_8B | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}),
        tie_word_embeddings=True,
    ),
    "llama-3-8b": LlamaConfig(**LLAMA_8B),
    "qwen3-4b": Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "mixtral-small": MixtralConfig(
        **(LLAMA_8B | {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 8})
    ),
    "phi3-longrope": Phi3Config(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=8,
        num_attention_heads=32,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters=LONGROPE,
        pad_token_id=0,
    ),
}


def write_shape(config: PreTrainedConfig, options: ExportOptions, folder: Path) -> dict[str, Any]:
    """Write the graph of a configuration; returns its placement."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[options.activation_dtype]
    of_config: Any = AutoModelForCausalLM._model_mapping
    model = skeleton_from_config(config, dtype, of_config[type(config)])
    capture = capture_decoder(model, last_token_logits=options.last_token_logits)
    shared: dict[int, Recipe] = {}
    recipes = {
        name: shared.setdefault(id(p), _empty(p.shape, p.dtype, name))
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    recipes |= {name: Value(value, name) for name, value in capture.constants.items()}
    for name, derived in capture.derived.items():
        recipes[name] = _empty(recipes[derived.source].shape, derived.dtype, name)
    graph = translate(
        capture.program,
        recipes,
        input_names=capture.input_names,
        output_names=capture.output_names,
        dim_names=capture.axis_names,
    )
    entries: dict[str, str] = {}
    if options.quantizes:
        report = quantize(graph, quantization_of(options), Calibration(), options.provider)
        entries = dict(report.session_options)
    placement = cuda_placement(graph, "choose another dtype", grows=not capture.share_buffer)
    content, places = graph_alone(graph)
    folder.mkdir(parents=True)
    (folder / MODEL_FILE).write_bytes(content)
    settings = genai_config(config, capture, {}, provider="cuda")
    settings["model"]["decoder"]["session_options"].update(entries)
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=4))
    said = {"placement": placement.report(), "data_bytes": places[-1].end}
    (folder / "bone_export.json").write_text(json.dumps(said, indent=2))
    return said


def _empty(shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Recipe:
    """The recipe of a parameter that nobody will ask for bytes."""
    return Value(torch.zeros((), dtype=dtype).expand(shape), name)


def main() -> None:
    """Write one graph."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--dtype", choices=("fp16", "bf16", "int4", "int8"), default="fp16")
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--last-token-logits", action="store_true")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder that is not yet")
    chosen = parser.parse_args()
    options = ExportOptions(
        dtype=chosen.dtype,
        provider="cuda",
        block_size=chosen.block_size,
        symmetric=False if chosen.asymmetric else None,
        last_token_logits=chosen.last_token_logits,
    )
    said = write_shape(SHAPES[chosen.shape], options, chosen.output)
    size = (chosen.output / MODEL_FILE).stat().st_size
    graph = said["placement"]["cuda_graph"]
    print(f"{chosen.output}: {size:,} bytes, {said['data_bytes']:,} of data; CUDA graph: {graph}")


if __name__ == "__main__":
    main()
