"""An adapter that was left in a base's folder, which `from_pretrained` would attach.

transformers 5 loads the adapter that it finds beside a model's weights when PEFT is installed, and
follows `base_model_name_or_path` to another model if the folder has no config.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """A base's folder as it is without an adapter in it: itself, or links to all other files."""
    if not (folder / ADAPTER_CONFIG).exists():
        yield folder
        return
    with TemporaryDirectory() as links:
        for path in folder.iterdir():
            if path.name not in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS):
                (Path(links) / path.name).symlink_to(path.resolve())
        yield Path(links)
