"""Fetching models and adapters from the hub: the only place that may use the network."""

from __future__ import annotations

import re
from pathlib import Path

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
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=_UNWANTED
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise kind(
            f"{hub_id} is no local folder, and it could not be fetched from the hub",
            expected="a folder that exists, or the id of a model that you may read",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            next_step=meant(
                hub_id, "check the spelling, the network, and `hf auth login` for gated models"
            ),
        ) from error
