"""Fetching from the Hugging Face hub and uploading to it: the only place that uses the network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bone_fx.errors import AdapterError, BaseModelError
from bone_fx.files.nearby import meant

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_TEXTS = ["*.json", "*.jinja", "*.txt", "*.model", "*.spm", "*.tiktoken"]
_WANTED = ["*.safetensors", *_TEXTS, "*.gguf", "README.md", "LICENSE*"]
_OF_ADAPTERS = ["adapter_model.safetensors", *_TEXTS, "README.md", "LICENSE*"]
# Folders whose names begin with a digit are modules of sentence-transformers, such as 2_Dense.
_UNWANTED = ["[!0-9]*/*.safetensors", "*/*.gguf", "onnx/*", "openvino/*"]


def cache_folder() -> Path:
    """Where models of the hub lie on this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def download(hub_id: str, revision: str | None, *, trust_remote_code: bool) -> Path:
    """A local folder with a hub model's configuration, weights and tokenizer.

    What the hub's cache already has is not fetched.

    Args:
        hub_id: `owner/name`.
        revision: Branch, tag or commit.
        trust_remote_code: Whether to fetch Python files too.

    Raises:
        BaseModelError: The id is none, the hub has no such model, or it cannot be reached.
    """
    if not _HUB_ID.fullmatch(hub_id):
        raise BaseModelError(
            f"{hub_id!r} is neither a file nor a hub id",
            expected="a model folder, a .gguf file, or owner/name",
            next_step=meant(hub_id, "correct the path, or give owner/name of a model of the hub"),
        )
    patterns = [*_WANTED, *(["*.py"] if trust_remote_code else [])]
    return _snapshot(hub_id, revision, patterns, BaseModelError)


def download_adapter(hub_id: str, revision: str | None) -> Path:
    """A local folder with a hub adapter's configuration, tensors and tokenizer.

    What the hub's cache already has is not fetched.

    Args:
        hub_id: `owner/name`.
        revision: Branch, tag or commit.

    Raises:
        AdapterError: The hub has no such adapter, or it cannot be reached.
    """
    return _snapshot(hub_id, revision, _OF_ADAPTERS, AdapterError)


def adapter_id(given: str) -> tuple[str, str | None] | None:
    """Id and revision of `owner/name` or `owner/name@revision`; None for what can only be a path.

    Args:
        given: What the person wrote, where nothing lies at that path.
    """
    hub_id, _, revision = given.partition("@")
    is_id = _HUB_ID.fullmatch(hub_id) is not None and "/" in hub_id
    return (hub_id, revision or None) if is_id else None


def _snapshot(
    hub_id: str,
    revision: str | None,
    patterns: list[str],
    kind: type[BaseModelError | AdapterError],
    unwanted: Sequence[str] = _UNWANTED,
    **options: Any,
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=list(unwanted),
                **options,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise kind(
            f"{hub_id} is no local folder, and it could not be fetched from the hub",
            expected="a folder that exists, or the id of a model that you may read",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            next_step=meant(hub_id, _next_step()),
        ) from error


def _next_step() -> str:
    """What to look at where nothing was fetched."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return "check the spelling, or unset HF_HUB_OFFLINE: only the cache was looked at"
    return "check the spelling, the network, and `hf auth login` for gated models"


def adapter_folder(
    model_id: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> Path:
    """The folder of an adapter: a local one, or a hub adapter's files in the hub's cache.

    Args:
        model_id: A folder, `owner/name` or `owner/name@revision`.
        subfolder: Folder of the adapter in it.
        revision: Branch, tag or commit, of the hub.
        cache_dir: Where to keep files of the hub.
        token: Of the hub; None takes the one that is stored.
        **options: More of `huggingface_hub.snapshot_download`.

    Raises:
        AdapterError: There is no such folder, the hub has no such adapter, or it cannot be reached.
    """
    folder = Path(model_id)
    if not folder.is_dir():
        found = adapter_id(str(model_id))
        if found is None:
            next_step = meant(str(model_id), "check the path")
            raise AdapterError(f"there is no adapter folder {model_id}", next_step=next_step)
        hub_id, noted = found
        patterns = [f"{subfolder}/{name}" if subfolder else f"*{name}" for name in _OF_ADAPTERS]
        options |= {"cache_dir": cache_dir, "token": token}
        folder = _snapshot(hub_id, revision or noted, patterns, AdapterError, (), **options)
    return folder / subfolder if subfolder else folder


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str = "Upload adapter",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a folder to a repository of the hub, which is made if needed.

    Returns:
        Address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=name,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
    )
    return str(commit.commit_url)
