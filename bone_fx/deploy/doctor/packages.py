"""Installed packages against what the project declares, read from their metadata."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import Distribution, distributions
from typing import TYPE_CHECKING

from bone_fx.deploy.doctor.finding import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PROJECT = "bone-fx"
_SAME_FILES: dict[str, tuple[str, ...]] = {
    "onnxruntime": (
        *("onnxruntime-gpu", "onnxruntime", "onnxruntime-directml", "onnxruntime-openvino"),
        *("onnxruntime-training", "onnxruntime-rocm", "onnxruntime-qnn", "ort-nightly"),
    ),
    "onnxruntime_genai": (
        *("onnxruntime-genai-cuda", "onnxruntime-genai", "onnxruntime-genai-directml"),
    ),
}
"""Packages that write the same files on disk, the wanted one first."""


def examine_packages(path: Sequence[str] | None = None) -> list[Finding]:
    """Versions of what the project needs, and packages that are in each other's way.

    Args:
        path: Folders with installed packages; the process's own by default.
    """
    installed = _installed(sys.path if path is None else path)
    if PROJECT not in installed:
        return [
            Finding(
                "problem",
                "package",
                "bone_fx is not installed: its requirements are not known",
                "pip install -e .  (in the checkout)",
            )
        ]
    return [
        _python(installed[PROJECT][0]),
        *_requirements(installed),
        *_doubles(installed),
        *_same_files(installed),
        *_conflicts(installed),
    ]


def _installed(path: Sequence[str]) -> dict[str, list[Distribution]]:
    """The distributions by normalised name; the first of each is the one that is imported."""
    from packaging.utils import canonicalize_name

    found: dict[str, list[Distribution]] = {}
    for distribution in distributions(path=list(path)):
        metadata = distribution.metadata
        if "Name" in metadata and "Version" in metadata:
            found.setdefault(canonicalize_name(metadata["Name"]), []).append(distribution)
    return found


def _python(project: Distribution) -> Finding:
    """The interpreter against what the project declares."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    version = ".".join(map(str, sys.version_info[:3]))
    needed = ", ".join(project.metadata.get_all("Requires-Python") or ())
    try:
        fits = SpecifierSet(needed).contains(version)
    except InvalidSpecifier:
        fits = True
    if fits:
        return Finding("ok", "package", f"Python {version}")
    return Finding(
        "problem",
        "package",
        f"Python {version} runs, {needed} is needed",
        f"install bone_fx in an environment of Python {needed}",
    )


def _declared(distribution: Distribution) -> Iterator[tuple[Requirement, str]]:
    """The requirements of a package that apply here, each with its extra or an empty text."""
    from packaging.requirements import InvalidRequirement, Requirement

    for text in distribution.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        marker = requirement.marker
        extras = [str(e) for e in distribution.metadata.get_all("Provides-Extra") or ()]
        if marker is None or marker.evaluate({"extra": ""}):
            yield requirement, ""
            continue
        extra = next((e for e in extras if marker.evaluate({"extra": e})), None)
        if extra is not None:
            yield requirement, extra


def _requirements(installed: Mapping[str, Sequence[Distribution]]) -> Iterator[Finding]:
    """What the project declares: there, there in another version, or not there."""
    from packaging.utils import canonicalize_name

    seen: set[str] = set()
    for requirement, extra in _declared(installed[PROJECT][0]):
        name = canonicalize_name(requirement.name)
        if name == PROJECT or name in seen:
            continue
        if name not in installed:
            seen.update([] if extra else [name])
            if not extra:
                yield Finding(
                    "problem",
                    "package",
                    f"{requirement.name} is not installed",
                    f"pip install '{requirement.name}{requirement.specifier}'",
                )
            elif extra in ("gpu", "genai", "gguf"):
                yield Finding(
                    "note",
                    "package",
                    f"{requirement.name} is not installed (extra {extra})",
                    f"pip install 'bone_fx[{extra}]'",
                )
            continue
        seen.add(name)
        version = installed[name][0].version
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding("ok", "package", f"{requirement.name} {version}")
        else:
            yield Finding(
                "note" if extra == "dev" else "problem",
                "package",
                f"{requirement.name} {version} is installed, {requirement.specifier} is needed",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )


def _doubles(installed: Mapping[str, Sequence[Distribution]]) -> Iterator[Finding]:
    """A package that is there twice in one folder, as an update that died leaves it."""
    for name, all_of_it in installed.items():
        folders = [str(each.locate_file("")) for each in all_of_it]
        versions = sorted({each.version for each in all_of_it})
        if len(versions) > 1 and len(set(folders)) < len(folders):
            yield Finding(
                "problem",
                "package",
                f"{name} is installed in several versions in one place: {', '.join(versions)}",
                f"pip install --force-reinstall --no-deps '{name}=={all_of_it[0].version}'",
            )


def _same_files(installed: Mapping[str, Sequence[Distribution]]) -> Iterator[Finding]:
    """Two packages that write one module: whichever came last is what is imported."""
    for module, packages in _SAME_FILES.items():
        there = [name for name in packages if name in installed]
        if len(there) < 2:
            continue
        wanted = there[0]
        version = installed[wanted][0].version
        yield Finding(
            "problem",
            "package",
            f"{' and '.join(there)} are both installed and overwrite each other's files: "
            f"{module} may be either",
            f"pip uninstall -y {' '.join(there)} && pip install --no-deps '{wanted}=={version}'",
        )


def _conflicts(installed: Mapping[str, Sequence[Distribution]]) -> Iterator[Finding]:
    """A package of the project's that needs another version of a third."""
    from packaging.utils import canonicalize_name

    ours = {canonicalize_name(r.name) for r, _ in _declared(installed[PROJECT][0])} - {PROJECT}
    for name in sorted(ours & set(installed)):
        for requirement, extra in _declared(installed[name][0]):
            other = installed.get(canonicalize_name(requirement.name))
            if extra or other is None:
                continue
            if not requirement.specifier.contains(other[0].version, prereleases=True):
                yield Finding(
                    "problem",
                    "package",
                    f"{name} {installed[name][0].version} needs {requirement.name}"
                    f"{requirement.specifier}, and {other[0].version} is installed",
                    f"pip install '{requirement.name}{requirement.specifier}'",
                )
