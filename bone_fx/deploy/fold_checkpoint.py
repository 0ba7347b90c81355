"""`fold_checkpoint`: adapters folded into a checkpoint, as a checkpoint of the same layout.

Tensors keep their names on disk, their files, their order and their dtype. They are read, folded
and written one at a time; no model is built with weights.

1. A staging folder is made beside the output (`deploy.staging.staged`).
2. The adapters are read and the base is opened (`deploy.checkpoint_inputs.open_checkpoint`).
3. The adapters are folded into the recipes of a model without weights (`CheckpointInputs.fold`);
   what they change gets its name and dtype on disk (`_folded_weights`, `_head_weights`).
4. Every weight file is written again (`_write`), and what stands beside it copied
   (`_copy_the_rest`).
5. Every folded weight is read back and compared with torch's own fold (`_verify`).
6. The manifest is written and the folder moved to the output (`deploy.manifest.manifest_of`,
   `Staging.publish`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bone_fx.adapter_folder import read_adapters
from bone_fx.deploy.checkpoint_inputs import (
    Adapters,
    CheckpointInputs,
    FoldedCheckpoint,
    open_checkpoint,
)
from bone_fx.deploy.earlier_output import MANIFEST
from bone_fx.deploy.manifest import files_of, manifest_of
from bone_fx.deploy.staging import staged
from bone_fx.errors import ExportError, FoldError, UsageError, VerificationError
from bone_fx.passes.fold import fold_weight
from bone_fx.progress import PUBLISH, Progress, Silent
from bone_fx.weights.recipes.fold_recipe import Fold, FoldPart
from bone_fx.weights.recipes.recipe import Read, Recipe, Value, cast
from bone_fx.weights.recipes.rounding import Rounding
from bone_fx.weights.storage.safetensors_file import read_header
from bone_fx.weights.writing.safetensors_writer import write_safetensors
from bone_fx.weights.writing.stream import workers

if TYPE_CHECKING:
    from bone_fx.base.loading import BaseCheckpoint

INDEX_SUFFIX = ".safetensors.index.json"
_BESIDE_WEIGHTS = (".json", ".txt", ".model", ".jinja", ".tiktoken")

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
    adapters: Sequence[str | Path],
    output: str | Path,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> FoldResult:
    """Fold adapters into a checkpoint and publish it as a Hugging Face folder.

    The fold is computed in float32 from the stored bytes and rounded once, to the stored dtype.
    Every folded weight is read back and compared with torch's fold before the folder is published.

    Args:
        base: A Hugging Face folder, a GGUF file or a hub id.
        adapters: Adapter folders in PEFT's layout, in the order in which they apply.
        output: Folder to publish: the base's files with other weights, and `bone_export.json`.
        overwrite: Replace an earlier output.
        trust_remote_code: Run Python files that come with the base, and copy them.
        revision: Branch, tag or commit of a hub id.
        progress: Gets the stages and the bytes.

    Raises:
        BoneFxError: One of its kinds; nothing is published, the inputs are as they were.

    Example:
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
        raise UsageError("there is nothing to fold", expected="one adapter or more")
    progress = progress or Silent()
    with staged(output, overwrite=overwrite, inputs=[*adapters, base]) as staging:
        progress.stage("read the inputs")
        inputs = open_checkpoint(
            base,
            read_adapters(adapters),
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        stored = _usual_dtype(inputs.checkpoint)
        rounding = Rounding(stored) if stored.itemsize == 2 else None
        folded = inputs.fold(torch.float32, rounding)
        recipes = {**_folded_weights(folded), **_head_weights(folded)}
        progress.stage("fold the weights")
        files = _write(inputs.checkpoint, recipes, staging.folder, progress)
        _copy_the_rest(inputs, staging.folder)
        progress.stage("verify")
        _verify(files, recipes, inputs.adapters)
        progress.stage(PUBLISH)
        manifest = manifest_of(
            "checkpoint",
            architecture=inputs.architecture.__name__,
            base_name=Path(inputs.checkpoint.origin).name,
            base_files=inputs.checkpoint.sha256(),
            adapters=inputs.adapters,
            entries={
                "rounding": None if rounding is None else rounding.report(),
                "files": files_of(
                    staging.folder, {path.name: sha256 for path, sha256 in files.items()}
                ),
            },
        )
        staging.publish(manifest)
    names = tuple(key for key, recipe in recipes.items() if isinstance(recipe, Fold))
    warnings = () if rounding is None else tuple(rounding.warnings())
    return FoldResult(staging.output, names, manifest, warnings)


def _usual_dtype(checkpoint: BaseCheckpoint) -> torch.dtype:
    """The dtype of a checkpoint's first tensor."""
    return next(iter(checkpoint.tensors.values())).dtype


def _folded_weights(folded: FoldedCheckpoint) -> dict[str, Recipe]:
    """The folded weights under their names on disk, in the dtype they are stored in."""
    weights: dict[str, Recipe] = {}
    for name, site in folded.sites.items():
        fold = folded.recipes[site.weight_name]
        if not isinstance(fold, Fold) or not isinstance(fold.base, Read):
            raise FoldError(
                f"{name} has no tensor of its own in the checkpoint: {fold.describe()}",
                expected="a weight that is stored as the model has it",
                next_step="export it with bone-export, or save the base with transformers first",
            )
        weights[fold.base.key] = replace(fold, to=fold.base.dtype)
    return weights


def _head_weights(folded: FoldedCheckpoint) -> dict[str, Recipe]:
    """Parameters that come from the adapters, in the dtype of the checkpoint."""
    checkpoint, plan = folded.inputs.checkpoint, folded.skeleton.plan
    stored = checkpoint.tensors
    heads: dict[str, Recipe] = {}
    for name, tensor in folded.inputs.heads.items():
        on_disk = name if name in stored else (plan.source_name(name) or name)
        dtype = stored[on_disk].dtype if on_disk in stored else _usual_dtype(checkpoint)
        heads[on_disk] = cast(Value(tensor, "adapter's"), dtype)
    return heads


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
        target = folder / file.name
        sha256[target] = write_safetensors(target, content, advance)
    for index in checkpoint.folder.glob(f"*{INDEX_SUFFIX}"):
        content_of_index = json.loads(index.read_text(encoding="utf-8"))
        content_of_index["weight_map"] |= dict.fromkeys(new, checkpoint.files[-1].name)
        text = json.dumps(content_of_index, indent=2) + "\n"
        (folder / index.name).write_text(text, encoding="utf-8")
    return sha256


def _copy_the_rest(inputs: CheckpointInputs, folder: Path) -> None:
    """Copy configuration, tokenizer and what else stands beside the weights."""
    from bone_fx.base.real_model import write_config

    checkpoint = inputs.checkpoint
    kinds = (*_BESIDE_WEIGHTS, *((".py",) if checkpoint.trust_remote_code else ()))
    for path in sorted(checkpoint.folder.iterdir()):
        is_written = path.name.endswith(INDEX_SUFFIX) or path.name == MANIFEST
        if path.is_file() and path.suffix in kinds and not is_written:
            shutil.copyfile(path, folder / path.name)
    if inputs.overrides or inputs.architecture is not checkpoint.architecture:
        write_config(checkpoint, inputs.architecture, inputs.overrides, folder)


def _verify(files: Iterable[Path], recipes: Mapping[str, Recipe], adapters: Adapters) -> None:
    """Read every folded weight back and compare it with torch's own fold, bit for bit."""
    by_key = {
        key: Read(path, key, entry) for path in files for key, entry in read_header(path).items()
    }
    for key, recipe in recipes.items():
        if not isinstance(recipe, Fold):
            continue
        same = partial(_is_the_fold, by_key[key], recipe, adapters)
        with workers() as pool:
            verified = all(pool.map(same, recipe.parts(_VERIFIED_BYTES)))
        if not verified:
            raise VerificationError(
                f"verification failed: {recipe.site}: the written weight is not the folded one",
                expected="torch's fold, bit for bit",
                next_step="nothing was published; the build is kept as <output>.rejected",
            )


def _is_the_fold(written: Read, recipe: Fold, adapters: Adapters, part: FoldPart) -> bool:
    return torch.equal(written.part(part.stored), _eagerly(recipe, part, adapters))


def _eagerly(recipe: Fold, part: FoldPart, adapters: Adapters) -> Tensor:
    steps = [
        (a.config.method, part.of_block(a.config.method, a.blocks[recipe.site]))
        for _, a in adapters
        if recipe.site in a.blocks
    ]
    with torch.no_grad():
        return fold_weight(
            recipe.base.part(part.stored), steps, transposed=recipe.transposed, layer=recipe.site
        )
