"""`python -m bone_fx` is `bone-export`."""

from __future__ import annotations

from bone_fx.cli import main

if __name__ == "__main__":
    main()
