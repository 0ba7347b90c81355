"""What is wrong with an environment, and what to type: `examine`; see README.md."""

from __future__ import annotations

from collections.abc import Sequence

from bone_fx.deploy.doctor.finding import Finding
from bone_fx.errors import ExportError, ProviderError

__all__ = ["Finding", "examine", "exit_code"]


def examine() -> list[Finding]:
    """Look at packages, libraries, providers, caches and disks; nothing is written."""
    from bone_fx.deploy.doctor.packages import examine_packages
    from bone_fx.deploy.doctor.places import examine_places
    from bone_fx.deploy.doctor.providers import examine_providers

    return [*examine_packages(), *examine_providers(), *examine_places()]


def exit_code(findings: Sequence[Finding]) -> int:
    """0 without problems; the code of a provider if only it cannot be had, else of an export."""
    about = {finding.about for finding in findings if finding.level == "problem"}
    if not about:
        return 0
    return ProviderError.exit_code if about == {"provider"} else ExportError.exit_code
