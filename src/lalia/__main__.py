"""``python -m lalia`` and ``torchrun -m lalia``."""

from __future__ import annotations

from lalia.cli import main

if __name__ == "__main__":
    main()
