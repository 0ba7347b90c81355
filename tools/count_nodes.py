"""Nodes of the decoder graph of every architecture, on tiny models, beside what they may be.

A layer's nodes are the difference between models of four and of two layers, halved, so that two
kinds of layers count alike. The models are those of the tests, with heads as wide as real ones are:
a rotary embedding that turns fewer than 16 columns stays outside the attention operator.

    python tools/count_nodes.py
    python tools/count_nodes.py llama gemma3_text --json
    python tools/count_nodes.py --run        # verified against eager, and run by onnxruntime-genai
    python tools/count_nodes.py --cuda       # kernels and CUDA graphs, in each dtype
    python tools/count_nodes.py --builder    # count the builder's graphs anew (minutes)

Exits with 1 if one has more nodes than its limit, is refused, or, with `--run`, is not its model,
or, with `--cuda`, has a node without a CUDA kernel or is not captured as a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from building import PROMPT, builder_nodes, eager_tokens, genai_tokens
from rich.console import Console
from rich.table import Table

from bone_fx.errors import BoneFxError

sys.path.insert(0, str(Path(__file__).parents[1]))
_tests: Any = import_module("tests.capture.decoder.decoding")
_rows: Any = import_module("tests.capture.decoder.decoders")

NAMES = (
    *("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "gemma2"),
    *("gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "olmo2"),
    *("smollm3", "granite", "stablelm", "starcoder2", "cohere", "gpt_oss"),
)
WIDER = {"gpt_neox": "gpt_neox_partial"}
"""Rows of the tests' table with wider heads."""

FEW, MANY = 2, 4
TOLERANCE = 1e-5
DENSE = 13
VERSION = "0.18.0"
BUILDER: dict[str, float] = {
    "llama": 11, "qwen2": 12, "qwen3": 18, "mistral": 11, "gemma": 10, "gemma2": 12,
    "gemma3_text": 19, "phi": 12, "phi3": 11, "smollm3": 11, "granite": 13, "gpt_oss": 11,
}  # fmt: skip
"""Nodes a layer of the graphs that onnxruntime-genai's builder makes of the same models in fp32.

With transformers 5.23 it builds gemma3_text only if the configuration is given the attribute
`rope_local_base_freq`, phi3 only without a window, smollm3 only with rotary embeddings everywhere.
"""

MORE = {"olmo2": (("norms over the full q/k width", 2), ("norms after the blocks", 2))}
EXPERTS = ("mixtral", "qwen3_moe")
WRITTEN_OUT = {"bloom": 34, "falcon": 29}
"""Nodes a layer of models that compute their attention by themselves: their own code stays."""


@dataclass(frozen=True)
class Limit:
    """Nodes that a layer may have, None for any number, and why."""

    nodes: float | None
    reason: str


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    parser.add_argument("--json", action="store_true", help="one JSON line an architecture")
    parser.add_argument("--run", action="store_true", help="verify and run each model")
    parser.add_argument("--cuda", action="store_true", help="CUDA kernels and CUDA graphs")
    parser.add_argument("--builder", action="store_true", help="build and count, where it works")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.names:
        rows.append(row_of(name, run=arguments.run, builder=arguments.builder))
        if arguments.cuda:
            rows[-1] |= on_cuda(name)
            expected = "no" if name in WRITTEN_OUT else "yes"
            rows[-1]["passes"] &= not rows[-1]["no_kernel"]
            rows[-1]["passes"] &= rows[-1]["cuda_graph"].startswith(expected)
        if arguments.json:
            print(json.dumps(rows[-1]), flush=True)
    if not arguments.json:
        table = Table(*(key.replace("_", " ") for key in rows[0]), title="decoder graphs")
        for row in rows:
            table.add_row(*("" if value is None else str(value) for value in row.values()))
        Console().print(table)
    raise SystemExit(not all(row["passes"] for row in rows))


def row_of(name: str, *, run: bool, builder: bool) -> dict[str, Any]:
    """What is known about an architecture; `refused` says why there is no graph."""
    row: dict[str, Any] = dict.fromkeys(("architecture", "nodes", "a_layer"))
    limit = limit_of(name, builder=builder)
    row |= {"architecture": name, "limit": limit.nodes, "reason": limit.reason, "passes": False}
    row |= dict.fromkeys(("furthest", "genai")) if run else {}
    row["refused"] = None
    try:
        few, many = (_nodes(name, layers) for layers in (FEW, MANY))
        row["nodes"], row["a_layer"] = many, (many - few) / (MANY - FEW)
        row["passes"] = limit.nodes is None or row["a_layer"] <= limit.nodes
        if run:
            row["furthest"], row["genai"] = run_of(name)
            row["passes"] &= row["furthest"] <= TOLERANCE and row["genai"] == "equal"
    except BoneFxError as error:
        row["refused"] = str(error).splitlines()[0]
    return row


def on_cuda(name: str) -> dict[str, str]:
    """What in the graphs for CUDA has no kernel, and whether the halves are captured as graphs.

    A graph in fp32 has its attention written out, and a cache that grows: it is not captured.
    """
    import torch

    from bone_fx.capture.decoder.capture_decoder import capture_decoder
    from bone_fx.deploy.builds.checkpoint_graph import NO_FP32_KERNEL
    from bone_fx.onnx.placement import place

    model, missing, reasons = model_of(name, FEW), [], []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for last in (False, True):
            skeleton = _tests.skeleton_of(model, dtype)
            unfused = NO_FP32_KERNEL if dtype == torch.float32 else None
            capture = capture_decoder(skeleton, unfused=unfused, last_token_logits=last)
            placement = place(_tests.onnx_of(capture, model))
            found = sorted(set(placement.missing.values()))
            missing += [f"{dtype}: {operator}, {reason}" for operator, reason in found]
            if dtype != torch.float32:
                reasons.append(placement.why_not_captured())
    why = next((reason for reason in reasons if reason is not None), None)
    return {
        "no_kernel": "; ".join(dict.fromkeys(missing)),
        "cuda_graph": "yes" if why is None else f"no: {why}",
    }


def limit_of(name: str, *, builder: bool) -> Limit:
    """The builder's count where it knows the architecture, else a fixed number."""
    if builder and (counts := [builder_nodes(model_of(name, n)) for n in (FEW, MANY)])[0]:
        few, many = counts
        assert few is not None
        assert many is not None
        return Limit((many - few) / (MANY - FEW), "the builder's, counted now")
    if name in BUILDER:
        return Limit(BUILDER[name], f"the builder's ({VERSION})")
    if name in EXPERTS:
        return Limit(None, "experts, which the builder does not know")
    if name in WRITTEN_OUT:
        return Limit(WRITTEN_OUT[name], "attention of the model's own, written out")
    more = MORE.get(name, ())
    reasons = [f"{DENSE} for a dense layer", *(f"{count} for {what}" for what, count in more)]
    return Limit(DENSE + sum(count for _, count in more), " + ".join(reasons))


def model_of(name: str, layers: int) -> Any:
    """The tests' model of an architecture with another number of layers."""
    rows = {row.name: row for row in _rows.DECODERS}
    row = rows.get(WIDER.get(name, name)) or _rows.Decoder(name, name)
    fields = row.build().config
    changes: dict[str, Any] = {"num_hidden_layers": layers}
    if kinds := getattr(fields, "layer_types", None):
        changes["layer_types"] = (list(kinds) * layers)[:layers]
    if getattr(fields, "no_rope_layers", None):
        changes["no_rope_layers"] = ([1, 0] * layers)[:layers]
    return row.build(**changes)


def _nodes(name: str, layers: int) -> int:
    model = model_of(name, layers)
    return len(list(_tests.onnx_of(_tests.capture_of(model), model).graph))


def run_of(name: str) -> tuple[float, str]:
    """Largest difference from eager on ragged texts, and whether onnxruntime-genai's text equals.

    Prefill of a ragged batch, three decode steps, a batch of one and a second chunk are compared.
    """
    import onnx_ir as ir

    from bone_fx.deploy.genai_config import CONFIG_FILE, genai_config

    model = model_of(name, MANY)
    capture = _tests.capture_of(model)
    graph = _tests.onnx_of(capture, model)
    furthest = max(_tests.differences(model, capture, _tests.session_of(graph)).values())
    expected = eager_tokens(model)
    # without an end onnxruntime-genai takes 0 for it
    model.config.eos_token_id = min(set(range(model.config.vocab_size)) - set(expected))
    with TemporaryDirectory() as folder:
        ir.save(graph, Path(folder) / "model.onnx")
        content = genai_config(model.config, capture, {})
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(content))
        ours = genai_tokens(Path(folder), expected[:PROMPT])
    return round(furthest, 8), "equal" if ours == expected else f"{ours} for {expected}"


if __name__ == "__main__":
    main()
