"""`bone-export doctor`: faulty environments, and libraries that end their process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from bone_fx.deploy.doctor import Finding, exit_code
from bone_fx.deploy.doctor.packages import examine_packages
from bone_fx.deploy.doctor.places import examine_folder
from bone_fx.deploy.doctor.providers import cuda_findings, has_gpu, try_program
from tests.command import run

SLOW = "it took more than 0.5 s"
NEEDS = {
    "onnxruntime-gpu": ">=1.31,<2",
    "torch": ">=2.13,<2.15",
    "transformers": ">=5.20,<6",
    "jinja2": ">=3.1",
}
GOOD = {
    "onnxruntime-gpu": "1.31.1",
    "torch": "2.13.0+cpu",
    "transformers": "5.23.0",
    "Jinja2": "3.1.6",
}


def install(site: Path, name: str, version: str, *needs: str) -> None:
    """Write what an installer leaves of a package, without its files."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += ["Provides-Extra: genai", *(f"Requires-Dist: {need}" for need in needs)]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    genai = 'onnxruntime-genai-cuda==0.18.*; extra == "genai"'
    install(tmp_path, "bone_fx", "0.1.0", *(n + v for n, v in NEEDS.items()), genai)
    return tmp_path


def installed(site: Path, **changes: str | None) -> None:
    versions = {**GOOD, **{name.replace("_", "-"): v for name, v in changes.items()}}
    for name, version in versions.items():
        if version is not None:
            install(site, name, version)


def problems(site: Path) -> list[Finding]:
    return [f for f in examine_packages([str(site)]) if f.level == "problem"]


def test_a_sound_environment_has_no_problem(site: Path) -> None:
    installed(site)
    found = examine_packages([str(site)])
    assert not problems(site)
    assert exit_code(found) == 0
    [note] = [finding for finding in found if finding.level == "note"]
    assert "onnxruntime-genai-cuda is not installed (extra genai)" in note.what
    assert note.next_step == "pip install 'bone_fx[genai]'"


@pytest.mark.parametrize(("needed", "fits"), [(">=3.11", True), (">=3.99", False)])
def test_the_interpreter_is_compared_with_what_is_declared(
    needed: str, tmp_path: Path, *, fits: bool
) -> None:
    install(tmp_path, "bone_fx", "0.1.0")
    metadata = tmp_path / "bone_fx-0.1.0.dist-info/METADATA"
    metadata.write_text(metadata.read_text() + f"Requires-Python: {needed}\n")
    found = [problem.what for problem in problems(tmp_path)]
    running = ".".join(map(str, sys.version_info[:3]))
    assert found == ([] if fits else [f"Python {running} runs, {needed} is needed"])


@pytest.mark.parametrize(
    ("changes", "what", "next_step"),
    [
        (
            {"transformers": "4.57.1"},
            "transformers 4.57.1 is installed, <6,>=5.20 is needed",
            "<6,>=5.20",
        ),
        ({"torch": None}, "torch is not installed", "pip install 'torch<2.15,>=2.13'"),
        (
            {"onnxruntime": "1.31.1"},
            "onnxruntime-gpu and onnxruntime are both installed",
            "onnxruntime-gpu onnxruntime && pip install --no-deps 'onnxruntime-gpu==1.31.1'",
        ),
        (
            {"onnxruntime-genai-cuda": "0.18.0", "onnxruntime-genai": "0.18.0"},
            "onnxruntime-genai-cuda and onnxruntime-genai are both",
            "'onnxruntime-genai-cuda==0.18.0'",
        ),
        ({"onnxruntime-genai-cuda": "0.12.0"}, "0.12.0 is installed, ==0.18.* is needed", "0.18.*"),
    ],
)
def test_versions_and_packages_that_are_in_each_others_way(
    changes: dict[str, str | None], what: str, next_step: str, site: Path
) -> None:
    installed(site, **changes)
    [problem] = problems(site)
    assert what in problem.what
    assert problem.next_step is not None
    assert next_step in problem.next_step
    assert exit_code([problem]) == 5


def test_an_update_that_died_and_a_package_that_needs_another(site: Path) -> None:
    installed(site, torch=None)
    install(site, "torch", "2.13.0", "sympy>=2")
    install(site, "torch", "2.14.0", "sympy>=2")
    install(site, "sympy", "1.14.0")
    twice, conflict = problems(site)
    assert "torch is installed in several versions in one place: 2.13.0, 2.14.0" in twice.what
    assert "needs sympy>=2, and 1.14.0 is installed" in conflict.what


def test_nothing_is_known_without_the_project(tmp_path: Path) -> None:
    [problem] = problems(tmp_path)
    assert "bone_fx is not installed" in problem.what


def test_damaged_metadata_is_passed_over(site: Path) -> None:
    installed(site)
    (site / "broken-1.0.dist-info").mkdir()
    install(site, "odd", "not a version", "][")
    assert not problems(site)


@pytest.mark.parametrize(
    ("library", "said"),
    [
        ("import os; os.abort()", "it ends its process: SIGABRT"),
        ("import os; os.kill(os.getpid(), 11)", "it ends its process: SIGSEGV"),
        ("import os; os._exit(3)", "it ends its process: exit status 3"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("import ctypes; ctypes.CDLL('libnowhere.so.13')", "libnowhere.so.13"),
        ("import time; time.sleep(60)", SLOW),
        ("print('noise'); x = 1", None),
    ],
)
def test_a_library_may_end_its_process(
    library: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_library.py").write_text(library)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = try_program(
        "answer['before'] = 1; say()\nimport bad_library", seconds=20 if said != SLOW else 0.5
    )
    assert (said in answer["error"]) if said else answer == {"before": 1}


def test_a_missing_provider_is_a_problem_only_where_there_is_a_gpu() -> None:
    for is_wanted, code in ((True, 7), (False, 0)):
        [finding] = cuda_findings(["CPUExecutionProvider"], is_wanted=is_wanted)
        assert exit_code([finding]) == code
        assert finding.next_step is not None
        assert "bone_fx[gpu]" in finding.next_step


def test_caches_that_cannot_be_written_and_disks_that_are_full(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    [no_folder] = examine_folder("cache", tmp_path / "file" / "cache", "export X=FOLDER")
    [full] = examine_folder("cache", tmp_path / "new" / "cache", "export X=FOLDER", 1 << 80)
    [good] = examine_folder("cache", tmp_path / "new" / "cache", "export X=FOLDER", 1)
    assert [finding.level for finding in (no_folder, full, good)] == ["problem", "problem", "ok"]
    assert no_folder.next_step == full.next_step == "export X=FOLDER"
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    [finding] = examine_folder("cache", tmp_path, "export X=FOLDER")
    assert "cannot be written" in finding.what


@pytest.mark.slow
def test_this_environment_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("doctor", "--json")
    findings = json.loads(done.stdout)["findings"]
    assert not [f for f in findings if f["level"] == "problem" and f["about"] != "provider"]
    assert done.returncode in ((0, 7) if has_gpu() else (0,))
    monkeypatch.setenv("BONE_FX_CACHE", "/dev/null/cache")
    done = run("doctor", "-q")
    assert done.returncode == 5
    assert "next: export BONE_FX_CACHE=FOLDER" in done.stdout
    assert not [line for line in done.stdout.splitlines() if line.startswith("ok")]
