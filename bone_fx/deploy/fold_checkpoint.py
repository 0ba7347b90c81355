"""`fold_checkpoint`: adapters folded into a checkpoint, as a checkpoint of the same layout.

Tensors keep their names on disk, their files, their order and their dtype. They are read, folded
and written one at a time; no model is built with weights.
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
from bone_fx.deploy.builds.plan import Adapters, Plan, adapted_sites, heads_and_class
from bone_fx.deploy.manifest import adapter_entries, versions, write_manifest
from bone_fx.deploy.staging import MANIFEST, refuse_inputs_as_output, staged
from bone_fx.errors import FoldError, UsageError, VerificationError
from bone_fx.passes.fold import fold_weight
from bone_fx.progress import Progress, Silent
from bone_fx.weights.apply_adapters import fold_recipes
from bone_fx.weights.load_plan import recipes_for
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
        progress: Told about stages and bytes.

    Raises:
        BoneFxError: One of its kinds; nothing is published, the inputs are as they were.
    """
    from bone_fx.base.loading import open_base, skeleton

    if not adapters:
        raise UsageError("there is nothing to fold", expected="one adapter or more")
    told = progress or Silent()
    refuse_inputs_as_output(output, [*adapters, str(base)])
    with staged(output, overwrite=overwrite) as staging:
        told.stage("read the inputs")
        read = read_adapters(adapters)
        checkpoint = open_base(base, trust_remote_code=trust_remote_code, revision=revision)
        checkpoint.start_hashing()
        architecture, overrides, heads = heads_and_class(checkpoint, read)
        model, load_plan = skeleton(
            checkpoint, torch.float32, architecture=architecture, config_overrides=overrides
        )
        plan = Plan(architecture, overrides, heads, read, adapted_sites(model, read))
        stored = next(iter(checkpoint.tensors.values())).dtype
        rounding = Rounding(stored) if stored.itemsize == 2 else None
        recipes = recipes_for(model, load_plan, checkpoint.tensors, extra=heads)
        recipes = fold_recipes(recipes, plan.sites, read, rounding=rounding)
        changed = {
            **_folded(recipes, plan),
            **_heads(checkpoint, load_plan.source_name, plan),
        }
        told.stage("fold the weights")
        files = _write(checkpoint, changed, staging.folder, told)
        _copy_the_rest(checkpoint, plan, staging.folder)
        told.stage("verify")
        _verify(files, changed, plan.adapters)
        told.stage("publish")
        manifest = {
            "format": 1,
            "kind": "checkpoint",
            "architecture": architecture.__name__,
            "base": {
                "name": Path(checkpoint.origin).name,
                "files": checkpoint.sha256(),
            },
            "adapters": adapter_entries(read),
            "rounding": rounding.report() if rounding is not None else None,
            "files": {path.name: digest for path, digest in files.items()},
            "versions": versions(),
        }
        write_manifest(staging.folder / MANIFEST, manifest)
        staging.publish()
    folded = tuple(key for key, recipe in changed.items() if isinstance(recipe, Fold))
    warnings = rounding.warnings() if rounding is not None else []
    return FoldResult(staging.output, folded, manifest, tuple(warnings))


def _folded(recipes: Mapping[str, Recipe], plan: Plan) -> dict[str, Recipe]:
    """The folded weights under their names on disk, in the dtype they are stored in."""
    found: dict[str, Recipe] = {}
    for name, site in plan.sites.items():
        fold = recipes[site.weight_name]
        if not isinstance(fold, Fold) or not isinstance(fold.base, Read):
            raise FoldError(
                f"{name} has no tensor of its own in the checkpoint: {fold.describe()}",
                expected="a weight that is stored as the model has it",
                next_step="export it with bone-export, or save the base with transformers first",
            )
        found[fold.base.key] = replace(fold, to=fold.base.dtype)
    return found


def _heads(checkpoint: BaseCheckpoint, source_name: Any, plan: Plan) -> dict[str, Recipe]:
    """Parameters that come from the adapters, in the dtype of the checkpoint."""
    stored = checkpoint.tensors
    usual = next(iter(stored.values())).dtype
    heads: dict[str, Recipe] = {}
    for name, tensor in plan.heads.items():
        on_disk = name if name in stored else (source_name(name) or name)
        dtype = stored[on_disk].dtype if on_disk in stored else usual
        heads[on_disk] = cast(Value(tensor, "adapter's"), dtype)
    return heads


def _write(
    checkpoint: BaseCheckpoint, changed: Mapping[str, Recipe], folder: Path, told: Progress
) -> dict[Path, str]:
    """Write every weight file; returns SHA-256 by path."""
    known = {key for file in checkpoint.files for key in read_header(file)}
    added = {key: recipe for key, recipe in changed.items() if key not in known}
    total = sum(file.stat().st_size for file in checkpoint.files)
    if shutil.disk_usage(folder).free < total:
        raise FoldError(
            f"not enough disk space in {folder.parent}",
            expected=f"{total:,} bytes",
            found=f"{shutil.disk_usage(folder).free:,} bytes available",
            next_step="free some space, or choose another output folder",
        )
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        told.advance(min(done, total), total)

    written: dict[Path, str] = {}
    for place, file in enumerate(checkpoint.files, start=1):
        content: dict[str, Recipe] = {
            key: changed.get(key) or Read(file, key, entry)
            for key, entry in read_header(file).items()
        }
        if place == len(checkpoint.files):
            content |= added
        target = folder / file.name
        written[target] = write_safetensors(target, content, advance)
    for index in checkpoint.folder.glob(f"*{INDEX_SUFFIX}"):
        listed = json.loads(index.read_text(encoding="utf-8"))
        listed["weight_map"] |= dict.fromkeys(added, checkpoint.files[-1].name)
        (folder / index.name).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    return written


def _copy_the_rest(checkpoint: BaseCheckpoint, plan: Plan, folder: Path) -> None:
    """Copy configuration, tokenizer and what else stands beside the weights."""
    from bone_fx.base.real_model import write_config

    kinds = (*_BESIDE_WEIGHTS, *((".py",) if checkpoint.trust_remote_code else ()))
    for path in sorted(checkpoint.folder.iterdir()):
        taken = path.name.endswith(INDEX_SUFFIX) or path.name == MANIFEST
        if path.is_file() and path.suffix in kinds and not taken:
            shutil.copyfile(path, folder / path.name)
    if plan.overrides or plan.architecture is not checkpoint.architecture:
        write_config(checkpoint, plan.architecture, plan.overrides, folder)


def _verify(files: Iterable[Path], changed: Mapping[str, Recipe], adapters: Adapters) -> None:
    """Read every folded weight back and compare it with torch's own fold, bit for bit."""
    by_key = {
        key: Read(path, key, entry) for path in files for key, entry in read_header(path).items()
    }
    for key, recipe in changed.items():
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
