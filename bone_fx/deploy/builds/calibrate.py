"""The text that a decoder's quantization is calibrated on, and what the model does with it.

Shape letters: K key/value heads (of a weight its inputs), D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bone_fx.deploy.checkpoint_inputs import FoldedCheckpoint
from bone_fx.errors import ExportError, UsageError
from bone_fx.weights.recipes.second_moments import SecondMoments

if TYPE_CHECKING:
    from bone_fx.base.calibration import Text


@dataclass(frozen=True)
class Calibration:
    """Statistics of the inputs of a decoder's products.

    Attributes:
        moments: Second moments of a weight's inputs by the id of the weight's recipe.
        entries: For the manifest; None if nothing was measured.
        notes: What a person should know.
    """

    moments: Mapping[int, SecondMoments] = field(default_factory=dict)
    entries: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CacheCalibration:
    """Statistics of a decoder's keys and values.

    Attributes:
        largest: Largest key and largest value of each channel, float32 `[K, D]`, by layer.
        entries: For the manifest: what was run.
        notes: What a person should know.
    """

    largest: Mapping[int, tuple[Tensor, Tensor]]
    entries: dict[str, Any]
    notes: tuple[str, ...] = ()


def calibrate(folded: FoldedCheckpoint, choice: str | Path | None, tokenizer: Path) -> Calibration:
    """Run a decoder on a text, its folded weights one at a time.

    Args:
        folded: The decoder and its folded weights.
        choice: A text file; None for the built-in text.
        tokenizer: The folder with the tokenizer that reads it.

    Raises:
        UsageError: The file holds no text.
    """
    from bone_fx.base.calibration import CalibrationError, measure_inputs

    text = _chosen(choice)
    inputs, recipes = folded.inputs, folded.recipes
    try:
        measured = measure_inputs(
            inputs.checkpoint, inputs.architecture, inputs.overrides, recipes, text, tokenizer
        )
    except CalibrationError as error:
        return Calibration(
            notes=(f"int4 is not calibrated but rounded to nearest: {error}",),
        )
    moments: dict[int, SecondMoments] = {}
    for name, found in measured.of_inputs.items():
        shared = moments.get(id(recipes[name]))
        moments[id(recipes[name])] = found if shared is None else shared + found
    entries = {"text": text.name, "sha256": text.sha256, "tokens": measured.tokens}
    return Calibration(moments, entries)


def calibrate_cache(
    folded: FoldedCheckpoint,
    choice: str | Path | None,
    tokenizer: Path,
    partners: Sequence[Tensor | None],
) -> CacheCalibration:
    """The same for the cache.

    Args:
        folded: The decoder and its folded weights.
        choice: A text file; None for the built-in text.
        tokenizer: The folder with the tokenizer that reads it.
        partners: For each layer the channel `[D]` that each channel of a key is turned with by its
            position; None for a layer whose keys are not turned.

    Raises:
        UsageError: The file holds no text.
        ExportError: The decoder does not run piece by piece.
    """
    from bone_fx.base.calibration import CalibrationError, measure_cache, token_ids

    text = _chosen(choice)
    inputs = folded.inputs
    notes: tuple[str, ...] = ()
    entries: dict[str, Any] = {"text": text.name, "sha256": text.sha256}
    try:
        ids: Tensor | None = token_ids(inputs.checkpoint, text, tokenizer)
    except CalibrationError as error:
        ids, entries = None, {"text": "random tokens"}
        notes = (f"the cache was measured on random tokens: {error}",)
    model = (inputs.checkpoint, inputs.architecture, inputs.overrides, folded.recipes)
    try:
        largest, tokens = measure_cache(*model, ids, partners)
    except CalibrationError as error:
        raise ExportError(
            "the keys and values of the cache cannot be measured",
            found=str(error),
            next_step="export without --kv-cache",
        ) from error
    return CacheCalibration(largest, {**entries, "tokens": tokens}, notes)


def _chosen(choice: str | Path | None) -> Text:
    from bone_fx.base.calibration import built_in_text

    return built_in_text() if choice is None else _text_of(Path(choice))


def _text_of(path: Path) -> Text:
    from bone_fx.base.calibration import Text

    try:
        content = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read as a calibration text",
            expected="a text file in UTF-8, or none",
            found=type(error).__name__,
            next_step="save it as UTF-8, or leave it out for the built-in text",
        ) from error
    if not content.strip():
        raise UsageError(
            f"{path} is empty",
            expected="a text of some hundred words",
            next_step="name another file, or leave it out for the built-in text",
        )
    return Text(path.name, content)
