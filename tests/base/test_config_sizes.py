"""A configuration that asks for more than its checkpoint has is refused before it is built."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bone_fx.base.loading import open_base, skeleton
from bone_fx.base.sizes.config_sizes import BoundedMemory
from bone_fx.errors import BaseModelError
from bone_fx.weights.load_plan import recipes_for
from tests.capture.architectures import BY_NAME
from tests.weights.checkpoints import edit_json, save

HUGE = (10**7, 10**9, 10**12, 2**63, 10**40)


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """A fault ends in a MemoryError, and not in a machine without memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in ("llama", "gpt2", "bert"):
        made[name] = tmp_path_factory.mktemp(name)
        save(BY_NAME[name], made[name])
    return made


CLAIMS: list[tuple[str, str]] = [
    *[("llama", f) for f in ("num_hidden_layers", "vocab_size", "hidden_size", "head_dim")],
    *[("llama", f) for f in ("intermediate_size", "num_attention_heads", "num_labels")],
    ("llama", "max_position_embeddings"),
    ("llama", "num_key_value_heads"),
    *[("gpt2", f) for f in ("n_layer", "n_embd", "n_head", "n_positions", "n_inner")],
    *[("bert", f) for f in ("type_vocab_size", "max_position_embeddings")],
]


def all_recipes(folder: Path) -> None:
    base = open_base(folder)
    recipes_for(*skeleton(base, torch.float32), base.tensors)


@pytest.mark.parametrize(("model", "field"), CLAIMS)
def test_refused_before_anything_is_built(model: str, field: str, folders: dict[str, Path]) -> None:
    config = folders[model] / "config.json"
    before = config.read_text()
    try:
        for value in HUGE:
            edit_json(config, **{field: value})
            with pytest.raises(BaseModelError, match="is more than this checkpoint can have"):
                all_recipes(folders[model])
    finally:
        config.write_text(before)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_position_embeddings": 1_048_576, "rope_theta": 5_000_000},
        {"max_window_layers": 70, "sliding_window": 1 << 20, "eos_token_id": 151_645},
        {"id2label": {"0": "a"}, "chunk_size_feed_forward": 0},
    ],
)
def test_ordinary_fields_are_no_sizes(fields: dict[str, Any], folders: dict[str, Path]) -> None:
    config = folders["llama"] / "config.json"
    before = config.read_text()
    try:
        edit_json(config, **fields)
        assert open_base(folders["llama"]).tensors
    finally:
        config.write_text(before)


def test_making_large_tensors_is_refused_before_they_are_made() -> None:
    with BoundedMemory(1000):
        assert torch.arange(10).shape == (10,)
        assert torch.empty(10**7, 10**7, device="meta").is_meta
        assert torch.empty(10**7, 10**7, device="meta")[:, 0::2].shape == (10**7, 10**7 // 2)
        column = torch.ones(100_000, 1)
        makers = [
            lambda: torch.empty(10**6, 10**6),
            lambda: torch.arange(10**12),
            lambda: column * column.T,
            lambda: torch.outer(column[:, 0], column[:, 0]),
            lambda: torch.zeros((2**40,), dtype=torch.bool),
            lambda: torch.eye(10**6),
            lambda: torch.full((10**9, 9), 1.0),
            lambda: torch.linspace(0, 1, 10**12),
        ]
        for make in makers:
            with pytest.raises(MemoryError):
                make()


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_kernels_of_the_hub_are_code(field: str, folders: dict[str, Path]) -> None:
    config = folders["llama"] / "config.json"
    before = config.read_text()
    try:
        edit_json(config, **{field: "someone/kernel@main:forward"})
        with pytest.raises(BaseModelError, match="--trust-remote-code"):
            open_base(folders["llama"])
    finally:
        config.write_text(before)
