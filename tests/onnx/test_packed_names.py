"""The name of a packed constant says which weights it holds."""

from __future__ import annotations

import pytest

from bone_fx.onnx.packed_names import packed_name, parts_of


@pytest.mark.parametrize(
    ("names", "packed"),
    [
        (["a.0.q.weight", "a.0.k.weight", "a.0.v.weight"], "a.0.q+k+v.weight"),
        (["a.q.bias", "a.k.bias"], "a.q+k.bias"),
        (["q", "k"], "q+k"),
        (["a.q.weight", "b.k.weight"], "a.q.weight++b.k.weight"),
        (["a.b.q", "k"], "a.b.q++k"),
        (["a.weight"], "a.weight"),
    ],
)
def test_names_come_back(names: list[str], packed: str) -> None:
    assert packed_name(names) == packed
    assert parts_of(packed) == names
