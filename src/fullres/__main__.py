"""`python -m fullres` is the command `fullres`."""

from __future__ import annotations

from fullres.cli import main

if __name__ == "__main__":
    main()
