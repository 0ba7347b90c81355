"""What an adapter is, before anything is done with it: `inspect_adapter`, and its lines of text."""

from bone_fx.deploy.inspection.text import as_lines
from bone_fx.deploy.inspection.view import inspect_adapter

__all__ = ["as_lines", "inspect_adapter"]
