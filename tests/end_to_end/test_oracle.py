"""Every case that PEFT computed: unmerged logits, gradients, folded weights, save and reload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

import bone_fx

pytestmark = pytest.mark.usefixtures("captures_once")

ORACLE = Path(__file__).parents[1] / "oracle"
CASES = [
    (path.parent, expected)
    for path in sorted(ORACLE.glob("*/case.json"))
    for expected in json.loads(path.read_text())["expected"]
]
INPUTS = ("input_ids", "attention_mask")


def relative(found: Tensor, expected: Tensor, mask: Tensor | None = None) -> float:
    """Largest difference at the positions that the mask keeps, over max(1, largest expected
    value)."""
    assert found.shape == expected.shape
    if mask is not None and found.dim() == 3:
        found, expected = found[mask.bool()], expected[mask.bool()]
    return float((found.detach() - expected).abs().max() / expected.abs().max().clamp_min(1.0))


def base_of(case: Path, info: dict[str, Any]) -> torch.nn.Module:
    """The case's base model in float32."""
    architecture = getattr(transformers, info["architecture"])
    model: torch.nn.Module = architecture.from_pretrained(case / "base", dtype=torch.float32)
    return model


def loss_of(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """The loss as the oracle defines it."""
    if kind == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100
    )


KINDS = {
    *("bert_cls_bone-default", "granite_bone_two-alpha+beta", "llama_bat_r4_all-default"),
    *("llama_bone_bf16_adapter-default", "llama_miss_mini-default", "llama_tied_bone-default"),
}
"""Of every run: each method, two adapters, an adapter in bfloat16, a tied head, a classifier."""


def named(case: Path, expected: dict[str, Any]) -> Any:
    """A case as a parameter; one that is of no kind of its own is slow."""
    name = f"{case.name}-{'+'.join(expected['active'])}"
    return pytest.param(case, expected, id=name, marks=() if name in KINDS else pytest.mark.slow)


@pytest.mark.parametrize(("case", "expected"), [named(*row) for row in CASES])
def test_case(case: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    info = json.loads((case / "case.json").read_text())
    oracle = load_file(case / expected["file"])
    inputs = {name: oracle[name] for name in INPUTS}
    mask = inputs["attention_mask"]
    name, *more = expected["active"]
    adapted = bone_fx.adapt(
        base_of(case, info), case / info["adapters"][name], inputs, adapter_name=name
    ).eval()
    for other in more:
        adapted.load_adapter(case / info["adapters"][other], other)
    if more:
        adapted.set_adapter(expected["active"])
    sites = {m["module"] for m in info["adapted_modules"] if m["adapter"] in expected["active"]}
    assert len([n for n in adapted.graph.nodes if "adapted_linear" in str(n.target)]) == len(sites)

    output = adapted(**inputs, labels=oracle["labels"])
    assert relative(output.logits, oracle["logits"], mask) <= 1e-5
    assert abs(float(output.loss.detach()) - expected["loss"]) <= 1e-5
    if "input_ids_left" in oracle:
        left = adapted(
            input_ids=oracle["input_ids_left"], attention_mask=oracle["attention_mask_left"]
        )
        assert relative(left.logits, oracle["logits_left"], oracle["attention_mask_left"]) <= 1e-5
    if not more:
        loss_of(output.logits, oracle["labels"], info["kind"]).backward()
        for key in [k for k in oracle if k.startswith("grad.") and k.endswith("_block")]:
            site = key.removeprefix("grad.").removeprefix("base_model.model.").rpartition(".")[0]
            gradient = adapted.get_parameter(f"{site}.bone_block.{name}").grad
            assert gradient is not None
            scale = oracle[key].abs().max()
            assert float((gradient - oracle[key]).abs().max() / scale) <= 1e-4, site

    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    folded = adapted.fold()
    assert relative(folded(**inputs).logits, oracle["logits"], mask) <= 5e-5
    state = folded.state_dict()
    assert not [k for k in state if "bone" in k]
    for key in [k for k in oracle if k.startswith("merged.")]:
        assert float((state[key.removeprefix("merged.")] - oracle[key]).abs().max()) <= 1e-6, key
    missing, unexpected = base_of(case, info).load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([], [])
    assert all(torch.equal(value, before[key]) for key, value in adapted.state_dict().items())

    if not more:
        adapted.save_pretrained(tmp_path)
        again = bone_fx.adapt(base_of(case, info), tmp_path, inputs, adapter_name=name).eval()
        assert relative(again(**inputs).logits, adapted(**inputs).logits.detach(), mask) == 0.0
