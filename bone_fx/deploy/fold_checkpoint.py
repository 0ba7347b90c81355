"""`fold_checkpoint`: adapters folded into a checkpoint, as a checkpoint of the same layout.

Tensors keep their names on disk, their files, their order and their dtype. They are read, folded
and written one at a time; no model is built with weights.

1. A staging folder is made beside the output (`deploy.staging.staged`).
2. The adapters are read and the base is opened (`deploy.checkpoint_inputs.open_checkpoint`).
3. The adapters are folded into the recipes of a model without weights (`CheckpointInputs.fold`);
   what they change gets its name and dtype on disk (`deploy.changed_tensors`).
4. Every weight file is written again (`_write`), and what stands beside it copied
   (`deploy.companions.checkpoint_folder.copy_the_rest`).
5. Every folded weight is read back and compared with torch's own fold (`_verify`): bit for bit, or
   for a LoRA within what float32 rounds (`verify.fold_bounds`). Every head is compared with the
   adapter's, and transformers says which tensor each of them gets when the folder is loaded
   (`deploy.changed_tensors.check_names`).
6. The manifest, a model card and a page are written (`deploy.manifest.manifest_of`,
   `deploy.report.write_reports`) and the folder is moved to the output (`Staging.publish`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bone_fx.adapter_folder import Adapters, read_adapters
from bone_fx.adapters import LowRank
from bone_fx.deploy.bias_fields import with_places_for_biases
from bone_fx.deploy.changed_tensors import changed_tensors, check_names
from bone_fx.deploy.checkpoint_inputs import open_checkpoint
from bone_fx.deploy.companions.checkpoint_folder import INDEX_SUFFIX, copy_the_rest
from bone_fx.deploy.companions.choice import hashes_beside_weights
from bone_fx.deploy.earlier_output import files_of
from bone_fx.deploy.input_files import files_read, local_adapters
from bone_fx.deploy.manifest import manifest_of
from bone_fx.deploy.report import write_reports
from bone_fx.deploy.report.origin import read_origin
from bone_fx.deploy.report.timing import Timed
from bone_fx.deploy.staging import staged
from bone_fx.errors import LOOK, ExportError, UsageError, VerificationError
from bone_fx.lora.config import LoraConfig
from bone_fx.progress import PUBLISH, Progress, shown
from bone_fx.verify.fold_bounds import fold_bounds, lies_within
from bone_fx.weights.recipes.fold_recipe import Fold, FoldPart, FoldStep
from bone_fx.weights.recipes.recipe import Read, Recipe
from bone_fx.weights.recipes.rounding import Rounding
from bone_fx.weights.recipes.stack import Entry, Stack
from bone_fx.weights.storage.safetensors_file import read_header
from bone_fx.weights.writing.safetensors_writer import write_safetensors
from bone_fx.weights.writing.stream import workers

if TYPE_CHECKING:
    from bone_fx.base.loading import BaseCheckpoint


_HEADS = "{} other tensors, read back: the adapter's, or the base's that they were tied to"
_VERIFIED_BYTES = 4 << 20
"""A weight is verified in parts that take as much in float32: they stay in a core's caches."""


@dataclass(frozen=True)
class FoldResult:
    """What a fold published.

    Attributes:
        output: The folder.
        folded: Names on disk of the weights that were folded.
        manifest: The content of `bone_export.json`.
        warnings: What a person should know.
    """

    output: Path
    folded: tuple[str, ...]
    manifest: dict[str, Any] = field(repr=False)
    warnings: tuple[str, ...] = ()


def fold_checkpoint(
    base: str | Path,
    *,
    adapters: Sequence[str | Path] | Mapping[str, str | Path],
    output: str | Path,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    allow_unused: Sequence[str] | None = None,
    progress: Progress | bool = True,
) -> FoldResult:
    """Fold adapters into a checkpoint and publish it as a Hugging Face folder.

    The fold is computed in float32 from the stored bytes (float64 ones in float64) and rounded
    once, to the stored dtype. Before the folder is published every folded weight and head is read
    back and compared, and transformers loads the folder's names.

    Args:
        base: A Hugging Face folder, a GGUF file or a hub id.
        adapters: Adapter folders in PEFT's layout or hub ids, in the order in which they apply; or
            name -> folder, to name them in the manifest.
        output: Folder to publish: the base's files with other weights, `bone_export.json`,
            `report.html` and a model card.
        overwrite: Replace an earlier output.
        trust_remote_code: Run Python files that come with the base, and copy them.
        revision: Branch, tag or commit of a hub id.
        allow_unused: Names, or patterns as for file names, of tensors in the base's or an adapter's
            files that may be left out though the model does not take them; the manifest notes them.
        progress: Tell stages and bytes on stderr, with a bar on a terminal; or what is to be told
            instead, an object with `stage(name)` and `advance(done, total)`.

    Raises:
        BoneFxError: One of its kinds; nothing is published, the inputs are as they were.

    Examples:
        >>> import bone_fx, tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
        >>> config = bone_fx.BoneConfig(r=8, target_modules=["c_attn"])
        >>> with tempfile.TemporaryDirectory() as d:
        ...     model.save_pretrained(f"{d}/base")
        ...     bone_fx.adapt(model, config, model.dummy_inputs).save_pretrained(f"{d}/adapter")
        ...     fold_checkpoint(f"{d}/base", adapters=[f"{d}/adapter"], output=f"{d}/out").folded
        ('transformer.h.0.attn.c_attn.weight',)
    """
    if not adapters:
        raise UsageError("there is nothing to fold", next_step="pass one adapter or more")
    adapters = local_adapters(adapters)
    inputs_read = files_read(base, list(adapters.values()))
    with (
        shown(progress) as told,
        staged(output, overwrite=overwrite, inputs=inputs_read) as staging,
    ):
        progress = timed = Timed(told)
        progress.stage("read the inputs")
        inputs = open_checkpoint(
            base,
            read_adapters(adapters),
            trust_remote_code=trust_remote_code,
            revision=revision,
            allow_unused=allow_unused or (),
        )
        inputs = with_places_for_biases(inputs)
        stored = _usual_dtype(inputs.checkpoint)
        rounding = Rounding(stored) if stored.itemsize == 2 else None
        folded = inputs.fold(torch.float32, rounding)
        changes = changed_tensors(folded, stored)
        recipes = changes.recipes
        progress.stage("fold the weights")
        files = _write(inputs.checkpoint, recipes, staging.folder, progress)
        notes = copy_the_rest(inputs, folded.skeleton.model, staging.folder)
        progress.stage("verify")
        _verify(files, recipes, inputs.adapters)
        check_names(staging.folder, folded, changes)
        names = tuple(key for key, recipe in recipes.items() if isinstance(recipe, Fold | Stack))
        is_product = any(isinstance(a.config, LoraConfig) for _, a in inputs.adapters)
        how_close = "within what float32 rounds" if is_product else "bit for bit"
        rounded = [] if rounding is None else rounding.warnings()
        progress.stage(PUBLISH)
        manifest = manifest_of(
            "checkpoint",
            architecture=inputs.architecture.__name__,
            base_name=inputs.checkpoint.name,
            base_files=inputs.checkpoint.sha256() | hashes_beside_weights(inputs.checkpoint.folder),
            base_origin=read_origin(inputs.checkpoint.origin, inputs.checkpoint.folder),
            adapters=inputs.adapters,
            entries={
                "change": folded.change.report(),
                "rounding": None if rounding is None else rounding.report(),
                "files": files_of(
                    staging.folder,
                    {
                        path.relative_to(staging.folder).as_posix(): sha256
                        for path, sha256 in files.items()
                    },
                ),
                "verified": True,
                "verification": {
                    "ran": [
                        f"{len(names)} folded weights, read back: torch's own fold, {how_close}",
                        *([_HEADS.format(heads)] if (heads := len(recipes) - len(names)) else []),
                        "the names, as transformers loads them",
                    ]
                },
                "notes": [*folded.notes, *notes, *rounded],
            },
        )
        manifest = write_reports(staging.folder, manifest, timed)
        staging.publish(manifest)
    return FoldResult(staging.output, names, manifest, tuple(manifest["notes"]))


def _usual_dtype(checkpoint: BaseCheckpoint) -> torch.dtype:
    """The dtype of a checkpoint's first tensor."""
    return next(iter(checkpoint.tensors.values())).dtype


def _write(
    checkpoint: BaseCheckpoint,
    recipes: Mapping[str, Recipe],
    folder: Path,
    progress: Progress,
) -> dict[Path, str]:
    """Write every weight file, with recipes in the place of tensors; returns SHA-256 by path."""
    stored = {key for file in checkpoint.files for key in read_header(file)}
    new = {key: recipe for key, recipe in recipes.items() if key not in stored}
    total = sum(file.stat().st_size for file in checkpoint.files)
    if shutil.disk_usage(folder).free < total:
        raise ExportError(
            f"not enough disk space in {folder.parent}",
            expected=f"{total:,} bytes",
            found=f"{shutil.disk_usage(folder).free:,} bytes available",
            next_step="free some space, or choose another output folder",
        )
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress.advance(min(done, total), total)

    sha256: dict[Path, str] = {}
    for place, file in enumerate(checkpoint.files, start=1):
        content: dict[str, Recipe] = {
            key: recipes.get(key) or Read(file, key, entry)
            for key, entry in read_header(file).items()
        }
        if place == len(checkpoint.files):
            content |= new
        target = folder / checkpoint.path_of(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        sha256[target] = write_safetensors(target, content, advance)
    for index in checkpoint.folder.glob(f"*{INDEX_SUFFIX}"):
        content_of_index = json.loads(index.read_text(encoding="utf-8"))
        content_of_index["weight_map"] |= dict.fromkeys(
            new, checkpoint.path_of(checkpoint.files[-1])
        )
        text = json.dumps(content_of_index, indent=2) + "\n"
        (folder / index.name).write_text(text, encoding="utf-8")
    return sha256


def _verify(files: Iterable[Path], recipes: Mapping[str, Recipe], adapters: Adapters) -> None:
    """Read what was changed back; folded weights are torch's own fold of the adapters' blocks."""
    by_key = {
        key: Read(path, key, entry) for path in files for key, entry in read_header(path).items()
    }
    for key, recipe in recipes.items():
        written: Recipe = by_key[key]
        if isinstance(recipe, Stack):
            for number, each in enumerate(recipe.recipes):
                assert isinstance(each, Fold)
                _verify_fold(Entry(written, number), each, adapters)
        elif isinstance(recipe, Fold):
            _verify_fold(written, recipe, adapters)
        elif not torch.equal(written.evaluate(), recipe.evaluate()):
            raise VerificationError(
                f"verification failed: {key}: the written tensor is not what was to be written",
                expected=recipe.describe(),
                next_step=f"{LOOK}; please report it",
            )


def _verify_fold(written: Recipe, recipe: Fold, adapters: Adapters) -> None:
    same = partial(_is_the_fold, written, recipe, list(_steps(recipe, adapters)))
    with workers() as pool:
        verified = all(pool.map(same, recipe.parts(_VERIFIED_BYTES)))
    if not verified:
        raise VerificationError(
            f"verification failed: {recipe.site}: the written weight is not the folded one",
            expected="torch's own fold",
            next_step=LOOK,
        )


def _steps(recipe: Fold, adapters: Adapters) -> Iterator[FoldStep]:
    """What acts on a weight, by the adapters and not by the recipe, where they have it as it is.

    Of stacked experts a checkpoint may keep other parts than the adapter, which the recipe has cut.
    """
    for (label, adapter), own in zip(_acting(recipe, adapters), recipe.steps, strict=True):
        block = adapter.blocks[recipe.site]
        is_cut = isinstance(block, LowRank) and block.is_stacked
        yield own if is_cut else FoldStep(adapter.config.method, block, label)


def _acting(recipe: Fold, adapters: Adapters) -> Adapters:
    return [pair for pair in adapters if recipe.site in pair[1].blocks]


def _is_the_fold(written: Recipe, recipe: Fold, steps: Sequence[FoldStep], part: FoldPart) -> bool:
    cut = [(step.method, part.step(step).block) for step in steps]
    base, actual = recipe.base.part(part.stored), written.part(part.stored)
    with torch.no_grad():
        low, high = fold_bounds(base, cut, transposed=recipe.transposed, layer=recipe.site)
    return torch.equal(actual, low) if low is high else lies_within(actual, low, high)
