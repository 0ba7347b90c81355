"""Nodes of the decoder graph of every architecture, on tiny models, and of a layer.

A layer's nodes are the difference between models of four and of six layers, halved, so that two
kinds of layers count alike. Nothing is verified here: tests/capture/test_deployment.py does that.

    python tools/count_nodes.py
    python tools/count_nodes.py llama gemma3_text --json
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bone_fx.errors import BoneFxError

sys.path.insert(0, str(Path(__file__).parents[1]))
_tests: Any = import_module("tests.capture.decoding")
_models: Any = import_module("tests.capture.architectures")

NAMES = (
    *("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "gemma2"),
    *("gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "olmo2"),
    *("smollm3", "granite", "stablelm", "starcoder2", "cohere", "gpt_oss"),
)
LAYERS = (4, 6)


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    parser.add_argument("--json", action="store_true", help="one JSON line an architecture")
    arguments = parser.parse_args()
    table = Table("architecture", "nodes, 4 layers", "a layer", "refused", title="decoder graphs")
    for name in arguments.names:
        row = count(name)
        if arguments.json:
            print(json.dumps(row), flush=True)
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    if not arguments.json:
        Console().print(table)


def count(name: str) -> dict[str, Any]:
    """One row; `refused` says why there is no graph."""
    try:
        nodes = [_nodes(name, layers) for layers in LAYERS]
    except BoneFxError as error:
        refused = str(error).splitlines()[0]
        return {"architecture": name, "nodes": None, "a_layer": None, "refused": refused}
    a_layer = (nodes[1] - nodes[0]) / (LAYERS[1] - LAYERS[0])
    return {"architecture": name, "nodes": nodes[0], "a_layer": a_layer, "refused": None}


def _nodes(name: str, layers: int) -> int:
    architecture = _models.BY_NAME[name]
    fields = architecture.build().config
    changes: dict[str, Any] = {"num_hidden_layers": layers}
    kinds = getattr(fields, "layer_types", None)
    if kinds:
        changes["layer_types"] = (list(kinds) * layers)[:layers]
    if getattr(fields, "no_rope_layers", None):
        changes["no_rope_layers"] = [1, 0] * (layers // 2)
    model = architecture.build(**changes)
    return len(list(_tests.onnx_of(_tests.capture_of(model), model).graph))


if __name__ == "__main__":
    main()
