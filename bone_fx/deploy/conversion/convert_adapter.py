"""`convert_adapter`: a Bone, BAT or MiSS adapter as a folder of another kind, for what reads that.

A Bone block D `[R, O]` is a LoRA of rank R: `B = Dᵀ`, and A `[R, I]` has a one where input i has
`i mod R`. A mini block is a Bone block whose columns are repeated. What BAT adds depends on the
weight and has full rank: as a LoRA it is rounded to the nearest of a rank, by its singular values.

Shapes: I in_features, O out_features, R block size or rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from bone_fx import __version__
from bone_fx.adapter_folder import WEIGHTS_NAME, TrainedFolder, read_adapter, write_adapter
from bone_fx.adapters import METHODS, LowRank, mini
from bone_fx.config import CONFIG_NAME, BoneConfig
from bone_fx.deploy.checkpoint_inputs import CheckpointInputs, open_checkpoint
from bone_fx.deploy.conversion.lora_folder import write_lora
from bone_fx.deploy.conversion.low_rank import delta, exact, nearest
from bone_fx.deploy.earlier_output import files_of
from bone_fx.deploy.input_files import files_read, local_adapter
from bone_fx.deploy.options import AdapterKind
from bone_fx.deploy.staging import staged
from bone_fx.errors import LOOK, AdapterError, UsageError, VerificationError, some
from bone_fx.sites import LinearSite

_PEFT_TYPES = {"bone": "BONE", "miss": "MISS"}
_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion published.

    Attributes:
        output: The folder, in PEFT's layout.
        kind: `peft_type` of its configuration.
        errors: For each layer that is rounded to a rank, `‖Δ - B A‖ / ‖Δ‖`; empty where the
            conversion is exact.
        warnings: What a person should know: files that stay behind.
    """

    output: Path
    kind: str
    errors: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def convert_adapter(
    adapter: str | Path,
    *,
    to: AdapterKind,
    output: str | Path,
    base: str | Path | None = None,
    approximate: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> ConvertResult:
    """Write a Bone, BAT or MiSS adapter as a folder of another kind.

    Args:
        adapter: Its folder in PEFT's layout, or a hub id.
        to: `"lora"` for tools that know LoRA only (vLLM, TGI, onnxruntime-genai): exact for Bone
            and mini. `"miss"` for PEFT 0.19 and later, which has no Bone. `"bone"` for PEFT 0.18
            and earlier; mini becomes Bone by repeating its columns.
        output: Folder to publish.
        base: The base model, whose layers' sizes a LoRA needs; None takes the one that the
            adapter's configuration names.
        approximate: Rank of the LoRA that a BAT adapter is rounded to.
        overwrite: Replace an earlier output.
        trust_remote_code: Run Python files that come with the base.
        revision: Branch, tag or commit of a base from the hub.

    Raises:
        AdapterError: The adapter is of another kind, or does not fit the base.
        UsageError: It is of that kind already, or BAT is to be a LoRA without `approximate`.
        BoneFxError: Another of its kinds; nothing is published.

    Examples:
        >>> import bone_fx, tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
        >>> config = bone_fx.BoneConfig(r=8, target_modules=["c_attn"])
        >>> with tempfile.TemporaryDirectory() as d:
        ...     model.save_pretrained(f"{d}/base")
        ...     bone_fx.adapt(model, config).save_pretrained(f"{d}/adapter")
        ...     bone_fx.convert_adapter(
        ...         f"{d}/adapter", to="lora", base=f"{d}/base", output=f"{d}/out"
        ...     ).kind
        'LORA'
    """
    if to not in get_args(AdapterKind):
        raise UsageError(f"to={to!r} is no kind", expected=" or ".join(get_args(AdapterKind)))
    place = local_adapter(adapter)
    folder = read_adapter(place)
    if not isinstance(folder, TrainedFolder):
        raise AdapterError(
            f"{folder.path} holds a {folder.config.peft_type} adapter",
            expected="Bone, BAT or MiSS",
            next_step="PEFT and its readers take it as it is; bone-export folds and exports it",
        )
    _check(folder, to, approximate)
    if base is None and _needs_base(folder.config, to):
        base = folder.config.base_model_name_or_path
        if not base:
            raise UsageError(
                "the sizes of the layers are the base's, and the adapter does not name it",
                next_step="pass --base BASE",
            )
    with staged(output, overwrite=overwrite, inputs=files_read(base, [place])) as staging:
        errors: dict[str, float] = {}
        if base is None:
            write_adapter(staging.folder, _config(folder, to), folder.blocks, _whole(folder))
        else:
            inputs = open_checkpoint(
                base,
                [("adapter", folder)],
                trust_remote_code=trust_remote_code,
                revision=revision,
            )
            folded = inputs.fold(torch.float32)
            if to == "lora":
                pairs = {}
                for name, pair, error in _pairs(folder, folded.sites, inputs, approximate):
                    pairs[name] = pair
                    if error is not None:
                        errors[name] = error
                names = [name for name, _ in folded.skeleton.model.named_modules()]
                write_lora(staging.folder, folder, folded.sites, pairs, names)
            else:
                blocks = {
                    name: mini.widen(folder.blocks[name], site.out_features)
                    for name, site in folded.sites.items()
                }
                write_adapter(staging.folder, _config(folder, to), blocks, _whole(folder))
        kind = read_adapter(staging.folder).config.peft_type
        warnings = _copy_the_rest(folder, staging.folder)
        staging.publish(
            {
                "format": 1,
                "kind": "adapter",
                "tool": f"bone_fx {__version__}",
                "from": folder.config.peft_type,
                "to": kind,
                "method": folder.config.method,
                "errors": errors,
                "verified": not errors,
                "notes": warnings,
                "files": files_of(staging.folder),
            }
        )
    return ConvertResult(staging.output, str(kind), errors, tuple(warnings))


def _check(folder: TrainedFolder, to: AdapterKind, approximate: int | None) -> None:
    config = folder.config
    if _PEFT_TYPES.get(to) == config.peft_type:
        raise UsageError(
            f"{folder.path} is a {config.peft_type} adapter already", next_step="use it as it is"
        )
    is_bat = config.method == "bat"
    if is_bat and to == "lora" and approximate is None:
        raise UsageError(
            "what BAT adds to a weight has full rank, a LoRA has not",
            expected="--approximate RANK, which prints the error of each layer",
            next_step="fold it instead, which is exact: bone-export fold BASE --adapter DIR -o OUT",
        )
    if approximate is not None and not (is_bat and to == "lora" and approximate >= 1):
        raise UsageError(
            "--approximate is the rank of a LoRA that BAT is rounded to",
            next_step="leave it out: other conversions are exact",
        )
    if folder.unused:
        raise AdapterError(
            f"{folder.path / WEIGHTS_NAME} holds tensors that mean nothing for this adapter",
            found=some(list(folder.unused)),
            next_step="save the adapter again",
        )


def _needs_base(config: BoneConfig, to: AdapterKind) -> bool:
    return to == "lora" or (config.method == "mini" and to == "bone")


def _config(folder: TrainedFolder, to: AdapterKind) -> BoneConfig:
    """The configuration of a Bone or MiSS adapter made of another."""
    config = folder.config
    if to == "miss":
        return replace(config, peft_type="MISS", inference_mode=True)
    init = True if config.method == "mini" else config.init_weights
    changes: dict[str, Any] = {"init_weights": init, "mini_r": 0, "miss_dropout": 0.0}
    return replace(config, peft_type="BONE", inference_mode=True, **changes)


def _pairs(
    folder: TrainedFolder,
    sites: Mapping[str, LinearSite],
    inputs: CheckpointInputs,
    rank: int | None,
) -> Iterator[tuple[str, LowRank, float | None]]:
    """For each layer its pair, and how far that is from the adapter where it is rounded."""
    weights: Mapping[str, Any] = {}
    if rank is not None:
        weights = replace(inputs, adapters=(), heads={}).fold(torch.float32).recipes
    for name, site in sites.items():
        block = folder.blocks[name].float()
        if rank is None:
            wide = mini.widen(block, site.out_features)
            pair = exact(wide, site.in_features)
            if not torch.equal(delta("lora", site, pair), delta("bone", site, wide)):
                raise VerificationError(f"{name}: the LoRA is not the block", next_step=LOOK)
            yield name, pair, None
            continue
        stored = weights[site.weight_name].evaluate()
        delta_OI = METHODS["bat"].delta(stored.t() if site.transposed else stored, block)
        pair = nearest(delta_OI, rank)
        left = (delta_OI - pair.b @ pair.a).norm()
        yield name, pair, float(left / delta_OI.norm().clamp_min(1e-30))


def _whole(folder: TrainedFolder) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in folder.modules_to_save.items()}


def _copy_the_rest(folder: TrainedFolder, target: Path) -> list[str]:
    """Copy the adapter's other files, such as a tokenizer; those that stay behind are named."""
    left = []
    for path in sorted(folder.path.iterdir()):
        if path.name in (CONFIG_NAME, WEIGHTS_NAME) or (target / path.name).exists():
            continue
        told = path.suffix in _PICKLES or path.name == "README.md"
        if told or not path.is_file() or path.is_symlink():
            left.append(path.name)
        else:
            shutil.copyfile(path, target / path.name)
    return [f"not taken along: {name}" for name in left]
