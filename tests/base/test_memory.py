"""The memory that a reference may take: what the system says, and when a model is streamed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bone_fx.base.loading import open_base
from bone_fx.base.real_model import room_for
from bone_fx.base.sizes.memory import available_memory
from tests.end_to_end.tiny import tiny_base

MIB = 1 << 20


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


MEMINFO = {"proc/meminfo": "MemTotal:  9216 kB\nMemFree:  17 kB\nMemAvailable:  4096 kB\n"}
VERSION_2 = {"proc/self/cgroup": "0::/user/job\n"}
JOB = {
    "sys/fs/cgroup/user/job/memory.max": str(3 * MIB),
    "sys/fs/cgroup/user/job/memory.current": str(2 * MIB),
    "sys/fs/cgroup/user/job/memory.stat": f"anon 7\ninactive_file {MIB}\nactive_file 0\n",
}
VERSION_1 = {
    "proc/self/cgroup": "5:devices:/\n4:cpu,memory:/job\n0::/\n",
    "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(5 * MIB),
    "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(4 * MIB),
    "sys/fs/cgroup/memory/job/memory.stat": "total_active_file 0\ntotal_inactive_file 96\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MEMINFO, 4 * MIB),
        ({**MEMINFO, **VERSION_2}, 4 * MIB),
        ({**MEMINFO, **VERSION_2, **JOB}, 2 * MIB),
        ({**VERSION_2, **JOB, "sys/fs/cgroup/user/job/memory.max": "max\n"}, None),
        (  # The group around it is narrower.
            {
                **VERSION_2,
                **JOB,
                "sys/fs/cgroup/user/memory.max": str(2 * MIB),
                "sys/fs/cgroup/user/memory.current": str(2 * MIB - 5),
            },
            5,
        ),
        ({**MEMINFO, **VERSION_1}, MIB + 96),
        (  # A container sees its own group at the top.
            {
                "proc/self/cgroup": "4:memory:/elsewhere/job\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "900",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000",
            },
            0,
        ),
    ],
)
def test_available_memory(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    write(tmp_path, files)
    assert available_memory(tmp_path) == expected


def test_this_system_says_something_possible() -> None:
    available = available_memory()
    assert available is None or 0 <= available < 1 << 50


def test_a_model_is_streamed_when_it_takes_over_half_of_the_memory(tmp_path: Path) -> None:
    base = open_base(tiny_base(tmp_path))
    whole = sum(tensor.entry.nbytes for tensor in base.tensors.values())
    assert room_for(base, None) is None
    assert room_for(base, 2 * whole) is None
    assert room_for(base, 2 * whole - 2) == whole - 1


def test_halves_count_as_the_floats_that_they_become(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    whole = sum(t.entry.nbytes for t in open_base(base).tensors.values())
    tensors = {n: torch.zeros(t.shape).half() for n, t in open_base(base).tensors.items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert room_for(open_base(base), 2 * whole - 2) == whole - 1
