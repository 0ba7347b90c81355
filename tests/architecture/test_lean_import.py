"""`import bone_fx` costs little, and the command line starts without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = [
    "transformers",
    "onnxruntime",
    "onnxruntime_genai",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "peft",
    "gguf",
]


def _loaded_after(statement: str) -> list[str]:
    code = f"import sys\n{statement}\nprint(*sorted(sys.modules.keys() & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    "statement",
    [
        "import bone_fx",
        "import bone_fx.cli",
        "from bone_fx import BoneConfig, adapt, fold_adapters, insert_adapters",
    ],
)
def test_import_leaves_heavy_libraries_out(statement: str) -> None:
    assert _loaded_after(statement) == []


def test_import_alone_does_not_load_torch() -> None:
    code = "import sys, bone_fx; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
