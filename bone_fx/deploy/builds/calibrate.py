"""The text that a decoder's quantization is calibrated on, and what the model does with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bone_fx.deploy.checkpoint_inputs import FoldedCheckpoint
from bone_fx.errors import UsageError
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


def calibrate(folded: FoldedCheckpoint, choice: str | Path | None, tokenizer: Path) -> Calibration:
    """Run a decoder on a text, its folded weights one at a time.

    Args:
        folded: The decoder and its folded weights.
        choice: A text file; None for the built-in text.
        tokenizer: The folder with the tokenizer that reads it.

    Raises:
        UsageError: The file holds no text.
    """
    from bone_fx.base.calibration import CalibrationError, built_in_text, measure_inputs

    text = built_in_text() if choice is None else _text_of(Path(choice))
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
