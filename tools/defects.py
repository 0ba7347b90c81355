"""Seeded defects: what verification finds, where it says that they are, and false alarms.

Tiny models of many architectures are exported without verification; each defect is put into a copy
of the written folder (a node's attribute, a byte of a weight, a field, the tokenizer), and the
verification of the export is run on it. A defect in a layer must be named with its layer, one
beside the graph with its file and field.

    python tools/defects.py                    # every defect
    python tools/defects.py window rope        # those whose names hold a word
    python tools/defects.py --clean            # no defect: 20 models in four dtypes
    python tools/defects.py --json

Exits with 1 if a defect is published, or an export without one is refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from defect_table import DEFECTS, Defect
from rich.console import Console
from rich.table import Table

import bone_fx
from bone_fx.adapter_folder import read_adapters
from bone_fx.deploy.checkpoint_inputs import open_checkpoint
from bone_fx.deploy.earlier_output import read_manifest
from bone_fx.deploy.verification import verify_checkpoint
from bone_fx.deploy.verify_export import exported_of
from bone_fx.errors import BoneFxError, VerificationError
from bone_fx.runtime.session import open_session
from bone_fx.verify.parity import TOLERANCE, difference

sys.path.insert(0, str(Path(__file__).parents[1]))
_decoders: Any = import_module("tests.capture.decoder.decoders")
_architectures: Any = import_module("tests.capture.architectures")
_mixtures: Any = import_module("tests.verify.mixtures")
_tiny: Any = import_module("tests.end_to_end.tiny")

CLEAN = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox"),
    *("opt", "falcon_new", "cohere", "olmo2", "stablelm", "mixtral"),
)
CLEAN_DTYPES = ("fp32", "fp16", "int4", "bf16")
PUBLISHED, CAUGHT, NAMED, SMALL = "published", "caught", "named", "below tolerance"


class Exports:
    """Exports of the tables' models without verification, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[str, str], tuple[Path, Path, list[Path]]] = {}

    def of(self, model: str, dtype: str) -> tuple[Path, Path, list[Path]]:
        """Output, base and adapters of a model in a dtype."""
        key = model, dtype
        if key not in self._made:
            place = self._folder / f"{model}-{dtype}"
            base, adapters = self._inputs(model, place)
            provider: Any = "cuda" if dtype == "bf16" else "cpu"
            bone_fx.export(
                base,
                output=place / "out",
                adapters=adapters,
                dtype=dtype,  # type: ignore[arg-type]
                provider=provider,
                verify="off",
            )
            self._made[key] = place / "out", base, adapters
        return self._made[key]

    def _inputs(self, model: str, place: Path) -> tuple[Path, list[Path]]:
        if model == "tiny":
            base = _tiny.tiny_base(place / "base")
            _tiny.tiny_tokenizer(base)
            return base, [_tiny.tiny_adapter(place / "adapter")]
        tables = (_architectures.ARCHITECTURES, _decoders.DECODERS, _mixtures.MIXTURES)
        rows = {row.name: row for table in tables for row in table}
        rows[model].build().save_pretrained(place / "base")
        return place / "base", []


def verify(folder: Path, base: Path, adapters: list[Path]) -> None:
    """The verification of an export, without the hashes of its manifest."""
    manifest = read_manifest(folder)
    assert manifest is not None
    inputs = open_checkpoint(base, read_adapters(adapters), trust_remote_code=False, revision=None)
    verify_checkpoint(exported_of(folder, manifest, inputs, "cpu"), inputs, "cpu", "full")


def result_of(defect: Defect, exports: Exports, place: Path) -> tuple[str, str]:
    """Whether a defect is published, caught or named, and the message."""
    out, base, adapters = exports.of(defect.model, defect.dtype)
    folder = place / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(out, folder)
    defect.seed(folder)
    try:
        verify(folder, base, adapters)
    except VerificationError as error:
        message = " ".join(str(error).split())
        return NAMED if all(name in message for name in defect.names) else CAUGHT, message
    except BoneFxError as error:
        return CAUGHT, " ".join(str(error).split())
    effect = effect_of(out, folder)
    if effect <= TOLERANCE["fp32"]:
        return SMALL, f"it changes the outputs by {effect:.2g} of the largest value"
    return PUBLISHED, f"it changes the outputs by {effect:.2g} of the largest value"


def effect_of(out: Path, damaged: Path) -> float:
    """How far a defect moves the outputs of the graph on random tokens or pixels."""
    generator = np.random.default_rng(0)
    kinds = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
    sizes = {"batch": 2, "batch_size": 2}
    feeds: dict[str, Any] = {}
    outputs = []
    for folder in (out, damaged):
        session = open_session(folder / "model.onnx")
        has_past = any(value.name.startswith("past_key_values.") for value in session.get_inputs())
        long = 96 if has_past else 64  # beyond the windows of the tables' models
        for value in session.get_inputs():
            is_past = value.name.startswith("past_key_values.")
            other = 0 if is_past else long if value.name in ("input_ids", "attention_mask") else 16
            shape = [sizes.get(d, other) if isinstance(d, str) else d for d in value.shape]
            dtype = kinds[value.type]
            array: Any
            if "mask" in value.name:
                array = np.ones(shape)
            elif np.issubdtype(dtype, np.integer):
                array = generator.integers(3, 90, shape)
            else:
                array = generator.normal(size=shape)
            feeds.setdefault(value.name, array.astype(dtype))
        outputs.append(session.run(None, feeds)[0])
    sound, changed = (torch.from_numpy(output) for output in outputs)
    return difference(changed, sound)


def clean(names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Exports without a defect: model, dtype, and what was wrong with it."""
    rows = {row.name: row for row in (*_decoders.DECODERS, *_mixtures.MIXTURES)}
    for model in (*CLEAN, *(row.name for row in _mixtures.MIXTURES)):
        for dtype in CLEAN_DTYPES:
            if names and not any(name in model for name in names):
                continue
            with TemporaryDirectory() as folder:
                rows[model].build().save_pretrained(Path(folder) / "base")
                provider: Any = "cuda" if dtype == "bf16" else "cpu"
                wrong = ""
                try:
                    bone_fx.export(
                        Path(folder) / "base",
                        output=Path(folder) / "out",
                        dtype=dtype,  # type: ignore[arg-type]
                        provider=provider,
                        verify_on="cpu",
                    )
                except BoneFxError as error:
                    wrong = " ".join(str(error).split())
                yield model, dtype, wrong


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="words of the defects' or models' names")
    parser.add_argument("--clean", action="store_true", help="exports without a defect")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    table = Table("model", "dtype", "defect", "result", "message")
    results: list[dict[str, Any]] = []
    show = Console(width=200)
    if options.clean:
        for model, dtype, wrong in clean(options.names):
            result = "false alarm" if wrong else "published"
            results.append({"model": model, "dtype": dtype, "result": result, "message": wrong})
    with TemporaryDirectory() as folder:
        exports = Exports(Path(folder))
        chosen = [d for d in DEFECTS if not options.clean]
        for defect in chosen:
            if options.names and not any(name in defect.name for name in options.names):
                continue
            start = time.perf_counter()
            result, message = result_of(defect, exports, Path(folder))
            print(
                f"{defect.model:20} {defect.dtype:5} {defect.name:40} {result}"
                f" {time.perf_counter() - start:.1f} s",
                file=sys.stderr,
            )
            results.append(
                {"model": defect.model, "dtype": defect.dtype, "defect": defect.name,
                 "result": result, "message": message}
            )  # fmt: skip
    for row in results:
        table.add_row(*(str(row.get(c, "")) for c in ("model", "dtype", "defect", "result")),
                      row["message"][:110])  # fmt: skip
    counts = {r: sum(x["result"] == r for x in results) for r in {x["result"] for x in results}}
    if options.as_json:
        print(json.dumps({"results": results, "counts": counts}, indent=1))
    else:
        show.print(table)
        show.print(counts)
    bad = "false alarm" if options.clean else PUBLISHED
    sys.exit(1 if counts.get(bad) else 0)


if __name__ == "__main__":
    main()
