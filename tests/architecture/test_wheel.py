"""The wheel, built from the sdist as an installer builds it, exports where nothing else of the
checkout is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.architecture.sources import PACKAGE, ROOT, project_files
from tests.end_to_end.tiny import tiny_adapter, tiny_base

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(target: str, source: Path, folder: Path) -> Path:
    """Build an sdist or a wheel with the build backend itself, which fetches nothing."""
    program = f"from hatchling.build import build_{target}; print(build_{target}({str(folder)!r}))"
    return folder / run(sys.executable, "-c", program, cwd=source).strip().splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, folder)) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel"))


def test_the_sdist_has_every_file_of_the_project(sdist: Path) -> None:
    files = {str(path.relative_to(ROOT)) for path in project_files()}
    packed = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    assert {name for name in files if not name.startswith(".")} <= packed


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    files = {str(path.relative_to(ROOT)) for path in project_files() if PACKAGE in path.parents}
    with ZipFile(wheel) as packed:
        assert {name for name in packed.namelist() if name.startswith("bone_fx/")} == files


def test_the_wheel_exports_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """Its dependencies are those that the tests run with: a second PyTorch would take minutes."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, *install, wheel, cwd=tmp_path)
    # The .pth files of a folder that a .pth file names are passed over, so that the checkout, which
    # is installed as editable there, is not on the path.
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    ours = Path(run(python, "-c", where, cwd=tmp_path).strip())
    (ours / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    imported = run(python, "-c", "import bone_fx; print(bone_fx.__file__)", cwd=tmp_path)
    assert Path(imported.strip()).parent == ours / "bone_fx"

    base, adapter = tiny_base(tmp_path / "base"), tiny_adapter(tmp_path / "adapter")
    command = (python.parent / "bone-export", base, "--adapter", adapter, "--dtype", "int4")
    content = json.loads(run(*command, "-o", tmp_path / "out", "--json", cwd=tmp_path))
    assert content["verified"] is True
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > 0
