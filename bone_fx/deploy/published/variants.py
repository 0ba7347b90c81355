"""The variants of a published folder, and the adapters that they were made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bone_fx.adapter_folder import read_adapters
from bone_fx.deploy.manifest import adapter_entry
from bone_fx.errors import UsageError, VerificationError


def of_variant(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the manifest of a folder says of one variant, as if it were exported alone."""
    return {**manifest, **manifest["variants"][name]}


def adapters_of_variants(
    manifest: Mapping[str, Any],
    adapters: Mapping[str, Path],
    variants: Mapping[str, Path],
) -> dict[str, Path]:
    """The adapter of every variant, by its name.

    Args:
        manifest: Of the folder.
        adapters: Folders of adapters by their names; each belongs to the variants that were made
            from its files.
        variants: Instead: the folder of each variant's adapter.

    Raises:
        UsageError: A variant has none, or there is no variant of a name.
        VerificationError: No variant was made from one of them.
    """
    names = list(manifest["variants"])
    given = dict(variants)
    if adapters and given:
        raise UsageError(
            "adapters are given both alone and for variants", next_step="pass one or the other"
        )
    if unknown := [name for name in given if name not in names]:
        raise UsageError(
            f"there is no variant {unknown[0]}",
            expected=", ".join(names),
            next_step="name it as it was exported",
        )
    for label, adapter in read_adapters(adapters):
        files = adapter_entry(label, adapter)["files"]
        made = [name for name in names if _files_of(manifest, name) == [files]]
        if not made:
            raise VerificationError(
                f"verification failed: no variant was made from the adapter {label}",
                expected="the adapters of " + ", ".join(names),
                next_step="pass --variant NAME=DIR for each",
            )
        given |= dict.fromkeys(made, adapters[label])
    if lacking := [name for name in names if name not in given]:
        raise UsageError(
            f"the variant {lacking[0]} is compared with its own adapter, and none is given",
            expected="an adapter for each of " + ", ".join(names),
            next_step=f"pass --variant {lacking[0]}=DIR too",
        )
    return {name: given[name] for name in names}


def _files_of(manifest: Mapping[str, Any], name: str) -> list[Any]:
    return [adapter["files"] for adapter in manifest["variants"][name]["adapters"]]
