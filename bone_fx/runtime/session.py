"""ONNX Runtime sessions on the provider that was asked for, judged by the session."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bone_fx.errors import ExportError, ProviderError, first_line

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_FATAL_ONLY = 4


def open_session(
    model: str | Path | bytes, provider: str = "cpu", *, quiet: bool = False
) -> onnxruntime.InferenceSession:
    """Open a session on one provider.

    Args:
        model: Path of a model, or its bytes.
        provider: `"cpu"` or `"cuda"`.
        quiet: Drop what kernels write to stderr by a log of their own as the model is loaded.

    Raises:
        ProviderError: The session does not run on that provider.
        ExportError: ONNX Runtime refuses the model.
    """
    import onnxruntime as ort

    wanted = PROVIDERS[provider]
    if provider == "cuda":
        require_provider(provider)
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    providers = [wanted] if provider == "cpu" else [wanted, PROVIDERS["cpu"]]
    try:
        with _quiet_stderr() if quiet else contextlib.nullcontext():
            session = ort.InferenceSession(
                model if isinstance(model, bytes) else str(model), options, providers=providers
            )
    except Exception as error:
        raise ExportError(
            "ONNX Runtime does not load the model",
            found=first_line(error),
            next_step="choose another dtype or provider; please report it if none works",
        ) from error
    if session.get_providers()[0] != wanted:
        raise _not_here(provider)
    return session


def require_provider(provider: str) -> None:
    """Make sure that a session of a tiny model runs on a provider here.

    Raises:
        ProviderError: It does not, with what to install.
    """
    if provider == "cpu":
        return
    import onnxruntime as ort

    wanted = PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        raise _not_here(provider)
    with contextlib.redirect_stdout(io.StringIO()), _quiet_stderr():
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        try:
            session = ort.InferenceSession(
                tiny_model(), options, providers=[wanted, PROVIDERS["cpu"]]
            )
        except Exception as error:
            raise _not_here(provider) from error
    if session.get_providers()[0] != wanted:
        raise _not_here(provider)


def _not_here(provider: str) -> ProviderError:
    return ProviderError(
        f"ONNX Runtime has no {PROVIDERS[provider]} here",
        expected=f"a session that runs on {PROVIDERS[provider]}",
        found="it falls back to the CPU",
        next_step="install bone_fx[gpu] on a machine with a GPU, or pass --verify-on cpu"
        " (bone-export verify: --provider cpu)",
    )


def tiny_model() -> bytes:
    """A model with one node, to see whether a provider runs any."""
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])], "tiny", value[:1], value[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """C++ reports missing libraries and slow paths on file descriptor 2, whatever the log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
