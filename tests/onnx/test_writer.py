from __future__ import annotations

import hashlib
import shutil
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import onnx
import pytest
import torch
from torch.export import export

from bone_fx.errors import ExportError, VerificationError
from bone_fx.onnx.data_layout import lay_out
from bone_fx.onnx.recipe_tensor import RecipeTensor
from bone_fx.onnx.translate import translate
from bone_fx.onnx.writer import DATA_FILE, write_model
from bone_fx.weights.recipes.recipe import Cast, Transpose, Value
from bone_fx.weights.storage.boxes import Box
from bone_fx.weights.writing import stream
from tests.onnx.models import Net, Tied, content, run, sizes


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_two_exports_are_the_same_bytes(tmp_path: Path) -> None:
    net, x = Net().eval(), torch.randn(3, 5, 50)
    found = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        written = write_model(translate(export(net, (x,)), {}), folder)
        found.append(content(folder))
        hashes = {file.name: file.sha256 for file in written.files}
        assert hashes == {n: hashlib.sha256(b).hexdigest() for n, b in found[-1].items()}
        assert sizes(written) == {n: len(b) for n, b in found[-1].items()}
    assert found[0] == found[1]


def test_the_file_is_what_the_checker_expects(tmp_path: Path) -> None:
    write_model(translate(export(Net().eval(), (torch.randn(3, 5, 50),)), {}), tmp_path)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    assert str(tmp_path).encode() not in (tmp_path / "model.onnx").read_bytes()


def test_a_tied_weight_is_written_once(tmp_path: Path) -> None:
    written = write_model(translate(export(Tied(), (torch.tensor([[1, 2]]),)), {}), tmp_path)
    assert sizes(written)[DATA_FILE] == 500 * 32 * 4
    assert written.constants == 1


def test_large_constants_start_on_a_page() -> None:
    model = translate(export(Tied(9000), (torch.tensor([[1, 2]]),)), {})
    (placement,) = lay_out(model.graph.initializers.values())
    assert placement.offset % 4096 == 0
    net = torch.nn.Sequential(torch.nn.Linear(50, 51), torch.nn.Linear(51, 6000))
    model = translate(export(net, (torch.randn(2, 50),)), {})
    placements = lay_out(model.graph.initializers.values())
    assert all(p.offset % (4096 if p.length >= 1 << 20 else 64) == 0 for p in placements)
    assert all(a.end <= b.offset for a, b in pairwise(placements))


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = translate(export(Net().eval(), (torch.randn(3, 5, 50),)), {})
    written = write_model(model, tmp_path, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (sizes(written)[DATA_FILE],) * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    model = translate(export(Net().eval(), (torch.randn(3, 5, 50),)), {})
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    write_model(model, tmp_path)
    assert before == {name: value.const_value for name, value in model.graph.initializers.items()}
    assert any(isinstance(tensor, RecipeTensor) for tensor in before.values())


def test_a_model_without_weights_has_one_file(tmp_path: Path) -> None:
    (tmp_path / DATA_FILE).write_bytes(b"of an earlier model")
    written = write_model(translate(export(torch.nn.ReLU(), (torch.randn(3),)), {}), tmp_path)
    assert (
        [path.name for path in tmp_path.iterdir()]
        == [f.name for f in written.files]
        == ["model.onnx"]
    )


def test_a_full_disk_is_found_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    model = translate(export(Net().eval(), (torch.randn(3, 5, 50),)), {})
    with pytest.raises(ExportError, match="not enough disk space") as caught:
        write_model(model, tmp_path)
    assert caught.value.found == "1,000 bytes available"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [8, 64], ids=["embedded", "external"])
def test_an_overflow_of_fp16_names_the_constant(size: int, tmp_path: Path) -> None:
    model = translate(export(torch.nn.Linear(size, size).half(), (torch.ones(2, size).half(),)), {})
    weight = torch.ones(size, size)
    weight[1, 2] = 70000
    model.graph.initializers["weight"].const_value = RecipeTensor(
        Transpose(Cast(Value(weight), torch.float16)), "weight"
    )
    with pytest.raises(VerificationError, match="1 values of 'weight' overflow") as caught:
        write_model(model, tmp_path)
    assert "70000" in str(caught.value.found)


def test_infinities_of_the_base_are_kept(tmp_path: Path) -> None:
    class Bias(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", torch.full((64, 64), -torch.inf).half().triu(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.bias).softmax(-1)

    x = torch.randn(64, 64).half()
    write_model(translate(export(Bias(), (x,)), {}, input_names=["x"]), tmp_path)
    (found,) = run(tmp_path, {"x": x})
    assert torch.allclose(found, Bias()(x), atol=1e-3)


def test_a_few_parts_are_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[int] = []

    class Counted(Value):
        def fill(self, out: torch.Tensor, at: Box) -> None:
            super().fill(out, at)
            if out.dim() == 2:
                filled.append(out.untyped_storage().data_ptr())

    monkeypatch.setattr(stream, "BAND_BYTES", 4 * 64 * 16)
    net = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)))
    model = translate(export(net, (torch.randn(2, 64),)), {})
    for name, value in model.graph.initializers.items():
        value.const_value = RecipeTensor(Counted(net.get_parameter(name).detach()), name)
    written = write_model(model, tmp_path)
    assert written.constants == 8  # biases of 256 bytes are embedded
    assert len(filled) == 8 * 4  # weights in four parts
    assert len(set(filled)) <= stream.BUFFERS
    expected = b"".join(
        net.get_parameter(f"{i}.weight").detach().numpy().tobytes() for i in range(8)
    )
    assert (tmp_path / DATA_FILE).read_bytes() == expected
