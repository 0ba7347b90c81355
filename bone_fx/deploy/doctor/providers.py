"""Libraries and providers, each tried in a process of its own, which it may end as it likes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bone_fx.deploy.doctor.finding import About, Finding

_SECONDS = 120
"""A library that takes longer to load is as good as broken."""
_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia/version")
_GPU = "pip install 'bone_fx[gpu]'"

_TORCH = """
import torch
answer["cuda"] = torch.version.cuda
answer["gpus"] = torch.cuda.device_count() if torch.version.cuda else 0
"""
_TRANSFORMERS = "from transformers import AutoModelForCausalLM, PreTrainedModel"
_GENAI = "import onnxruntime_genai as og; answer['cuda'] = og.is_cuda_available()"
_ONNXRUNTIME = """
import onnxruntime as ort
answer["version"] = ort.__version__
answer["providers"] = ort.get_available_providers()
from bone_fx.runtime.session import open_session, tiny_model
open_session(tiny_model(), "cpu")
"""
_CUDA = """
import ctypes, pathlib
import onnxruntime as ort
from bone_fx.runtime.session import require_provider
try:
    require_provider("cuda")
    answer["runs"] = True
except Exception as error:
    answer["error"] = str(error).splitlines()[0]
    say()
    folder = pathlib.Path(ort.__file__).parent / "capi"
    for name in ("shared", "cuda"):
        try:
            library = str(folder / f"libonnxruntime_providers_{name}.so")
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError as missing:
            answer["missing"] = str(missing)
"""
_PROGRAM = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
answer = {{}}
def say():
    out.write(json.dumps(answer) + "\\n")
    out.flush()
try:
    {body}
except BaseException as error:
    answer["error"] = type(error).__name__ + ": " + (str(error).strip().splitlines() or [""])[0]
say()
os._exit(0)
"""


def examine_providers() -> list[Finding]:
    """Whether the libraries load, and which providers run a model here."""
    return [
        *_loads("torch", _TORCH, "pip install --force-reinstall --no-deps torch"),
        *_loads("transformers", _TRANSFORMERS, "pip install --force-reinstall transformers"),
        *_onnxruntime(),
        *_genai(),
    ]


def try_program(body: str, seconds: float = _SECONDS) -> dict[str, Any]:
    """Run Python in a process of its own.

    Args:
        body: Statements, which may fill the dictionary `answer`, and call `say()` before a step
            that could end the process.
        seconds: How long it may take.

    Returns:
        What it last said; `error` if something was raised or the process ended by itself.
    """
    program = _PROGRAM.format(body=body.strip().replace("\n", "\n    "))
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it took more than {seconds:g} s"}
    except OSError as error:
        return {"error": f"no process could be started: {error}"}
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    answer: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if done.returncode != 0:
        answer.setdefault("error", f"it ends its process: {_ending(done.returncode)}")
    return answer


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def has_gpu() -> bool:
    """Whether this machine shows an NVIDIA device."""
    return any(os.path.exists(device) for device in _DEVICES)


def _loads(name: str, body: str, next_step: str, about: About = "package") -> Iterator[Finding]:
    answer = try_program(body)
    if "error" in answer:
        yield Finding("problem", about, f"{name} does not load: {answer['error']}", next_step)
    else:
        yield Finding("ok", about, f"{name} loads")


def _onnxruntime() -> Iterator[Finding]:
    answer = try_program(_ONNXRUNTIME)
    if "error" in answer:
        yield Finding(
            "problem",
            "package",
            f"onnxruntime does not run a model on the CPU: {answer['error']}",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install bone_fx",
        )
        return
    yield Finding("ok", "provider", f"onnxruntime {answer['version']} runs a model on the CPU")
    yield from cuda_findings(answer["providers"], is_wanted=has_gpu())


def cuda_findings(providers: list[str], *, is_wanted: bool) -> Iterator[Finding]:
    """Whether CUDA runs; a problem only on a machine with a GPU.

    Args:
        providers: What onnxruntime was built with.
        is_wanted: Whether there is a GPU.
    """
    level: Any = "problem" if is_wanted else "note"
    without = "" if is_wanted else " (no GPU here: --provider cuda needs --verify-on cpu)"
    if "CUDAExecutionProvider" not in providers:
        yield Finding(
            level,
            "provider",
            f"this onnxruntime has no CUDA provider{without}",
            "pip uninstall -y onnxruntime onnxruntime-gpu && " + _GPU,
        )
        return
    answer = try_program(_CUDA)
    if answer.get("runs"):
        yield Finding("ok", "provider", "onnxruntime runs a model on CUDA")
        return
    yield _cuda_failure(answer, level, without)


def _cuda_failure(answer: Mapping[str, Any], level: Any, without: str) -> Finding:
    missing = answer.get("missing")
    if missing:
        library = str(missing).replace(str(Path(sys.prefix)), "")
        what = f"a library of the CUDA provider cannot be loaded: {library}"
        return Finding(level, "provider", what + without, _GPU)
    what = f"CUDA does not run a model: {answer.get('error', 'no answer')}"
    return Finding(level, "provider", what + without, "nvidia-smi  (is the driver new enough?)")


def _genai() -> Iterator[Finding]:
    from importlib.util import find_spec

    if find_spec("onnxruntime_genai") is None:
        return
    answer = try_program(_GENAI)
    if "error" in answer:
        yield Finding(
            "problem",
            "package",
            f"onnxruntime-genai does not load: {answer['error']}",
            "pip install --force-reinstall --no-deps onnxruntime-genai-cuda",
        )
    else:
        yield Finding("ok", "package", "onnxruntime-genai loads")
