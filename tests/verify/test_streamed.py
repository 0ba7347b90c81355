"""A verification whose reference has no room in memory: the same figures, the same findings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo
from safetensors.torch import load_file, save_file

import bone_fx
from bone_fx.adapter_folder import read_adapters
from bone_fx.deploy.checkpoint_inputs import open_checkpoint
from bone_fx.deploy.earlier_output import read_manifest
from bone_fx.deploy.manifest import figures_of
from bone_fx.deploy.verification import verify_checkpoint
from bone_fx.deploy.verify_export import exported_of
from bone_fx.errors import VerificationError
from tests.end_to_end.tiny import LAYERS, tiny_adapter, tiny_base
from tests.memory import PRINT_PEAK
from tests.tiers import slow

LITTLE, SOME, PLENTY = 1000, 100_000, 1 << 40
"""Bytes of memory: for no weight, for some, for the whole reference of 200 kB."""


class Export(NamedTuple):
    """An export that was not verified, and what it was made of."""

    out: Path
    base: Path
    adapters: list[Path]

    def verify(self, memory: int, level: str = "full") -> Mapping[str, Any]:
        """What the manifest would say of its verification with so much memory."""
        manifest = read_manifest(self.out)
        assert manifest is not None
        adapters = read_adapters(self.adapters)
        inputs = open_checkpoint(self.base, adapters, trust_remote_code=False, revision=None)
        exported = exported_of(self.out, manifest, inputs, "cpu")
        return figures_of(verify_checkpoint(exported, inputs, "cpu", level, memory=memory))

    def copy(self, out: Path) -> Export:
        """The same in a folder of its own."""
        return self._replace(out=shutil.copytree(self.out, out))


def exported(top: Path, **choices: Any) -> Export:
    """A tiny Llama under a Bone adapter, which also trained the embeddings, and a BAT adapter."""
    base = tiny_base(top / "base", tie_word_embeddings=True)
    bone = tiny_adapter(top / "bone", modules_to_save=["embed_tokens"])
    generator = torch.Generator().manual_seed(2)
    blocks = load_file(bone / "adapter_model.safetensors")
    embeddings = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    noise = 0.1 * torch.randn(embeddings.shape, generator=generator)
    key = "base_model.model.model.embed_tokens.weight"
    save_file({**blocks, key: embeddings + noise}, bone / "adapter_model.safetensors")
    bat = tiny_adapter(top / "bat", r=8, init_weights="bat")
    rows = {"self_attn.q_proj": 48, "self_attn.k_proj": 48, "mlp.up_proj": 80}
    tensors = {
        f"base_model.model.model.layers.{layer}.{name}.bone_block": 0.2
        * torch.randn(count // 8, 8, 8, generator=generator)
        for layer in range(LAYERS)
        for name, count in rows.items()
    }
    save_file(tensors, bat / "adapter_model.safetensors")
    bone_fx.export(base, output=top / "out", adapters=[bone, bat], verify="off", **choices)
    return Export(top / "out", base, [bone, bat])


@pytest.fixture(scope="module", params=["fp32", "int4", *slow("fp16")])
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return exported(tmp_path_factory.mktemp(request.param), dtype=request.param)


def test_figures_are_those_of_a_reference_in_memory(export: Export) -> None:
    expected = export.verify(PLENTY)
    assert expected["reference"] == "in memory"
    for memory in (LITTLE, SOME):
        actual = export.verify(memory)
        assert actual["reference"] == "streamed"
        *warnings, note = actual["warnings"]
        assert "the exporter's own reader" in note
        assert {**actual, "reference": "in memory", "warnings": warnings} == expected


def test_a_weight_that_is_another_is_named(export: Export, tmp_path: Path) -> None:
    damaged = export.copy(tmp_path / "out")
    model = onnx.load(damaged.out / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if "layers.1.mlp.down_proj" in t.name)
    place = ExternalDataInfo(tensor)
    with (damaged.out / place.location).open("r+b") as data:
        data.seek((place.offset or 0) + 64)
        value = data.read(1)
        data.seek(-1, 1)
        data.write(bytes([value[0] ^ 0x77]))
    with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.down_proj"):
        damaged.verify(LITTLE, "fast")


def test_a_layer_that_computes_another_thing_is_named(export: Export, tmp_path: Path) -> None:
    damaged = export.copy(tmp_path / "out")
    model = onnx.load(damaged.out / "model.onnx", load_external_data=False)
    norm = "model.layers.1.post_attention_layernorm"
    node = next(n for n in model.graph.node if any(i.startswith(norm) for i in n.input))
    next(a for a in node.attribute if a.name == "epsilon").f = 3.0
    onnx.save(model, damaged.out / "model.onnx")
    with pytest.raises(VerificationError, match=rf"first layer that differs: {norm}"):
        damaged.verify(LITTLE, "fast")


PROGRAM = f"""
import sys
from pathlib import Path
from bone_fx.base.loading import open_base
from bone_fx.base.real_model import load_model
from bone_fx.verify.compare_quantized import Written
from bone_fx.verify.constants import verify_constants
from bone_fx.verify.decoder.running import alone
from bone_fx.verify.unmerged.peft_layout import PeftAdapter
from bone_fx.verify.reference import fold_in_place, unmerged

for out in map(Path, sys.argv[1:]):
    base = open_base(out.parent / "base")
    model = load_model(base, base.architecture, {{}}, {{}}, room=2 << 20)
    adapters = [PeftAdapter.read(out.parent / "adapter")]
    verify_constants(out / "model.onnx", model, adapters)
    with unmerged(model, adapters):
        alone(model, [range(40)])
    fold_in_place(model, adapters)
    alone(model, [range(40)])
    if out.name == "int4":
        assert Written(out / "model.onnx", accuracy_level=4).load_into(model) > 7
        alone(model, [range(40)])
    {PRINT_PEAK.strip().replace(chr(10), chr(10) + "    ")}
"""
"""The reference's part of the verifications of exports: the peak of memory after each."""


@pytest.mark.slow
def test_a_large_reference_needs_a_part_of_its_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6}
    outs = []
    for name, layers, dtypes in (("small", 1, ["int4"]), ("large", 6, ["fp16", "int4"])):
        top = tmp_path / name
        changes = {"head_dim": 64, "num_key_value_heads": 6, "num_hidden_layers": layers}
        base = tiny_base(top / "base", **sizes, **changes)
        adapter = tiny_adapter(top / "adapter", r=8, target_modules=["up_proj"])
        blocks = {
            f"base_model.model.model.layers.{layer}.mlp.up_proj.bone_block": torch.randn(8, 1024)
            for layer in range(layers)
        }
        save_file(blocks, adapter / "adapter_model.safetensors")
        for dtype in dtypes:
            choices: Any = {"dtype": dtype, "calibration": "none", "verify": "off"}
            bone_fx.export(base, output=top / dtype, adapters=[adapter], **choices)
            outs.append(top / dtype)
    # glibc gives back at once what is larger, as weights of a large model are.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *outs],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    small, *_, large = map(int, done.stdout.split())
    weights = (tmp_path / "large" / "base" / "model.safetensors").stat().st_size
    assert weights > 40e6
    assert large - small < weights / 3
