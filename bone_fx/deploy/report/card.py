"""`README.md`: a model card with licence and base, how to run the folder, what was verified."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bone_fx.deploy.report.page import cases, meaning
from bone_fx.deploy.report.signature import signature_rows
from bone_fx.deploy.report.templating import markdown_templates

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,40}")
_AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
}
"""The transformers class that loads a model of a class with such an ending."""
_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider"]}
_LENGTH = 8
"""Size of a dynamic axis in an example that is no batch."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
_OF_TOKENIZERS = {"input_ids", "attention_mask", "token_type_ids"}


def card(manifest: Mapping[str, Any]) -> str:
    """The card; it holds no times.

    Args:
        manifest: The content of `bone_export.json`.
    """
    base, adapters = manifest["base"], manifest["adapters"]
    graph = manifest.get("graph", {})
    inputs = graph.get("inputs", {})
    architecture = manifest["architecture"]
    loader = next((a for end, a in _AUTO_CLASSES.items() if architecture.endswith(end)), None)
    reads_text = any(name in manifest["files"] for name in _TOKENIZERS)
    verification = manifest.get("verification") or {}
    figures = verification.get("figures", {})
    return (
        markdown_templates()
        .get_template("card.j2")
        .render(
            manifest=manifest,
            base=base,
            adapters=adapters,
            licence=_licence(base),
            base_models=_base_models(adapters),
            loader=loader or architecture,
            generates=loader == "AutoModelForCausalLM",
            reads_text=reads_text,
            takes_text=reads_text and bool(inputs) and set(inputs) <= _OF_TOKENIZERS,
            genai_text="tokenizer.json" in manifest["files"],
            providers=repr(_PROVIDERS.get(manifest.get("provider", "cpu"), [])),
            arrays={name: _array(kind) for name, kind in inputs.items()},
            signature={kind: signature_rows(graph[kind]) for kind in ("inputs", "outputs")}
            if graph
            else {},
            cases=cases(verification),
            figures=[(name, f"{v:.3g}", meaning(name)) for name, v in figures.items()],
        )
    )


def _licence(base: Mapping[str, Any]) -> str | None:
    """The base's licence for the front matter; `other` for what is no identifier."""
    stated = base.get("license", [])
    if not stated:
        return None
    return stated[0] if len(stated) == 1 and _LICENCE.fullmatch(stated[0]) else "other"


def _base_models(adapters: Sequence[Mapping[str, Any]]) -> list[str]:
    """Hub ids of the base that the adapters name."""
    named = [name for adapter in adapters for name in adapter.get("base_model", ())]
    return [name for name in dict.fromkeys(named) if _HUB_ID.fullmatch(name)]


def _array(kind: str) -> str | None:
    """A NumPy array for an input such as `int64[batch, 3]`; None if NumPy has no such dtype."""
    dtype, _, dims = kind.removesuffix("]").partition("[")
    if dtype in ("bfloat16", "") or not dtype.isidentifier():
        return None
    sizes = [_size(dim, place) for place, dim in enumerate(dims.split(", ") if dims else ())]
    shape = ", ".join(map(str, sizes)) + ("," if len(sizes) == 1 else "")
    return f"np.ones(({shape}), dtype=np.{'bool_' if dtype == 'bool' else dtype})"


def _size(dim: str, place: int) -> int:
    if dim.isdigit():
        return int(dim)
    return 1 if place == 0 or "batch" in dim else _LENGTH
