"""`python -m bone_fx` is `bone-export`."""

from __future__ import annotations

from bone_fx.cli import program

if __name__ == "__main__":
    program()
