"""The other side of a comparison: graphs that others make, texts that onnxruntime-genai generates.

The builder of onnxruntime-genai takes a model in memory; nothing is downloaded, and the tokenizer
that it copies is one of numbers.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

PROMPT, NEW = 7, 12


def builder_nodes(model: Any) -> int | None:
    """Nodes of the builder's graph (fp32, CPU); None where it cannot build the model."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {str(i): i for i in range(model.config.vocab_size)}
    numbers = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    with TemporaryDirectory() as top:
        base, out = Path(top) / "base", Path(top) / "out"
        model.save_pretrained(base)
        make: Any = PreTrainedTokenizerFast
        make(tokenizer_object=numbers, eos_token="2").save_pretrained(base)
        command: list[str | Path] = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", base, "-o", out, "-p", "fp32", "-e", "cpu", "-c", Path(top) / "cache"]
        built = subprocess.run(command, capture_output=True, check=False).returncode == 0
        if not built or not (out / "model.onnx").exists():
            return None
        return len(onnx.load(out / "model.onnx", load_external_data=False).graph.node)


def eager_tokens(model: Any) -> list[int]:
    """A prompt of random tokens and what transformers makes of it, greedily, without an end."""
    import torch

    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=generator)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with torch.no_grad():
        text = model.generate(prompt, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    tokens: list[int] = text[0].tolist()
    return tokens


def genai_tokens(folder: Path, prompt: list[int]) -> list[int]:
    """What onnxruntime-genai makes of a prompt with the model in a folder."""
    import numpy as np
    import onnxruntime_genai as og

    loaded = og.Model(str(folder))
    parameters = og.GeneratorParams(loaded)
    parameters.set_search_options(max_length=len(prompt) + NEW, do_sample=False)
    run = og.Generator(loaded, parameters)
    run.append_tokens(np.array([prompt], np.int32))
    while not run.is_done():
        run.generate_next_token()
    return [int(token) for token in run.get_sequence(0)]


def optimized_encoder(base: Path, folder: Path) -> Path:
    """What ONNX Runtime's own optimizer makes of an export of an encoder's folder.

    The TorchScript exporter and eager attention are those whose patterns the optimizer knows: of
    other exports by transformers 5.23 it fuses no attention (onnxruntime 1.31).

    Raises:
        SystemExit: It fused no attention, and so is nothing to compare with.
    """
    import torch
    from onnxruntime.transformers import optimizer
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return tuple(self.model(input_ids=input_ids, attention_mask=attention_mask).values())

    names = ["input_ids", "attention_mask"]
    ids = torch.full((2, 9), 5)
    torch.onnx.export(
        Encoder(),
        (ids, torch.ones_like(ids).tril(6)),
        folder / "plain.onnx",
        input_names=names,
        dynamic_axes={name: {0: "batch", 1: "length"} for name in names},
        opset_version=17,
        dynamo=False,
    )
    optimized: Any = optimizer.optimize_model(
        str(folder / "plain.onnx"),
        model_type="bert",
        num_heads=model.config.num_attention_heads,
        hidden_size=model.config.hidden_size,
        opt_level=1,
    )
    fused = sum(node.op_type == "Attention" for node in optimized.model.graph.node)
    if fused != model.config.num_hidden_layers:
        sys.exit(f"ONNX Runtime's optimizer fused {fused} attentions")
    optimized.save_model_to_file(str(folder / "optimized.onnx"))
    return folder / "optimized.onnx"
