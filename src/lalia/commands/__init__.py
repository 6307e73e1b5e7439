"""One file per command: it reads the arguments, calls what does the work, and prints. No other module imports them."""

from __future__ import annotations
