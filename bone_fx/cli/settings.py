"""How every command of `bone-export` is set up."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}
HELP_FLAGS = {"help_option_names": ["-h", "--help"]}
