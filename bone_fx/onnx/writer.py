"""A model on disk: `model.onnx` and one `model.onnx.data`, written constant by constant.

Recipes are evaluated band by band, in the order of their sources, and go straight to the file:
peak memory does not grow with the model. The same model and sources give the same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

from bone_fx.errors import ExportError
from bone_fx.onnx.data_layout import Placement, external, lay_out
from bone_fx.onnx.recipe_tensor import RecipeTensor
from bone_fx.weights.recipes.recipe import CastOverflowError
from bone_fx.weights.writing.overflow import refuse_overflow
from bone_fx.weights.writing.stream import Piece, write_stream

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes there will be."""


@dataclass(frozen=True)
class WrittenFile:
    """A file: its name in the folder, its size, and its SHA-256, taken while it was written."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class WrittenModel:
    """What was written.

    Attributes:
        files: `model.onnx` and, if any constant is large enough, `model.onnx.data`.
        constants: Number of constants in the data file.
    """

    files: tuple[WrittenFile, ...]
    constants: int

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)


def write_model(model: ir.Model, folder: Path, progress: Progress | None = None) -> WrittenModel:
    """Writes a model whose initializers may be recipes; the model is as it was when this returns.

    Args:
        model: From `bone_fx.onnx.translate`.
        folder: An existing folder; files of the same names are replaced.
        progress: Told about every write.

    Raises:
        ExportError: The disk is full, or would be; with bytes needed and available.
        VerificationError: A value that was finite is not after rounding; names the constant.
    """
    content, placements = graph_alone(model)
    size = placements[-1].end if placements else 0
    _require_space(folder, size + len(content))
    files = []
    try:
        if placements:
            files.append(
                WrittenFile(DATA_FILE, size, _write_data(folder / DATA_FILE, placements, progress))
            )
        else:
            (folder / DATA_FILE).unlink(missing_ok=True)
        (folder / MODEL_FILE).write_bytes(content)
    except OSError as error:
        raise ExportError(
            f"{folder} could not be written",
            found=error.strerror or str(error),
            next_step="choose another -o, on a disk with space and without a limit on files",
        ) from error
    files.insert(0, WrittenFile(MODEL_FILE, len(content), hashlib.sha256(content).hexdigest()))
    return WrittenModel(tuple(files), len(placements))


def graph_alone(model: ir.Model) -> tuple[bytes, list[Placement]]:
    """The bytes of `model.onnx`, and where its constants lie in the data file."""
    placements = lay_out(model.graph.initializers.values())
    with _external(model, placements):
        content = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    return content, placements


@contextmanager
def _external(model: ir.Model, placements: list[Placement]) -> Iterator[None]:
    """Puts references in the place of large constants, and small ones' bytes of recipes."""
    before: Mapping[ir.Value, ir.TensorProtocol | None] = {
        value: value.const_value for value in model.graph.initializers.values()
    }
    try:
        for placement in placements:
            for value in placement.values:
                value.const_value = external(placement, value, DATA_FILE)
        for value in before:
            tensor = value.const_value
            if isinstance(tensor, RecipeTensor):
                evaluated = _evaluate(Piece(value.name or "", tensor.recipe, 0))
                value.const_value = ir.tensor_adapters.TorchTensor(evaluated, name=value.name)
        yield
    finally:
        for value, tensor in before.items():
            value.const_value = tensor


def _write_data(path: Path, placements: list[Placement], progress: Progress | None) -> str:
    total, done = placements[-1].end, 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    pieces = [Piece(p.values[0].name or "", p.recipe, p.offset) for p in placements]
    return write_stream(path, pieces, refuse=refuse_overflow, advance=advance)


def _evaluate(piece: Piece) -> Tensor:
    try:
        return piece.recipe.evaluate()
    except CastOverflowError:
        refuse_overflow(piece)
        raise


def _require_space(folder: Path, needed: int) -> None:
    available = shutil.disk_usage(folder).free
    if available < needed:
        raise ExportError(
            f"not enough disk space in {folder}",
            expected=f"{needed:,} bytes",
            found=f"{available:,} bytes available",
            next_step="free some space, or choose another output folder",
        )
