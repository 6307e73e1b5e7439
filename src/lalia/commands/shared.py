"""What several commands need: telling files from overrides, loading a run, naming a checkpoint, and the command's own name."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lalia.system import System

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
WHICH_HELP = "Which checkpoint: best, latest, or a step such as step-00002000."
DEVICE_HELP = "auto (cuda, then mps, then cpu), cpu, mps, cuda or cuda:N."
JSON_HELP = "Also write the report to this file."


def split_overrides(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments as (files, ``key=value`` overrides), each in the given order."""
    overrides = [item for item in items if OVERRIDE.match(item)]
    return [item for item in items if not OVERRIDE.match(item)], overrides


def program() -> str:
    """How this program was called, for commands that the user is told to type: ``.venv/bin/python -m lalia`` or ``lalia``."""
    called = Path(sys.argv[0])
    if called.name in ("lalia", "lalia.exe"):
        return "lalia" if called.is_absolute() and not called.is_relative_to(Path.cwd()) else _from_here(called)
    return f"{_from_here(Path(sys.executable))} -m lalia"


def _from_here(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)


def load_system(run: Path, which: str, device: str) -> System:
    """The trained system of a run folder, on ``device``. FileNotFoundError names the runs that there are beside it."""
    from lalia import checkpoint, dist

    if not run.is_dir() and not run.is_symlink():
        beside = sorted(p.name for p in run.parent.iterdir() if p.is_dir()) if run.parent.is_dir() else []
        there = f"; folders in {run.parent}: {', '.join(beside[:10])}" if beside else ""
        raise FileNotFoundError(f"no run folder {run}{there}")
    return checkpoint.load(run, str(dist.choose_device(device)), which)


def run_root(run: Path) -> Path:
    """The run folder that a run folder, ``step-…`` folder or ``best``/``latest`` pointer belongs to."""
    return run if (run / "config.yaml").is_file() else run.parent


def step_label(run: Path, which: str) -> str:
    """``step 1200`` of the checkpoint that :func:`load_system` takes."""
    from lalia import checkpoint

    if run_root(run) != run:
        return f"step {checkpoint.open_set(run.resolve()).step}"
    if which not in ("best", "latest"):
        return f"step {checkpoint.open_set(run / which).step}"
    found = (checkpoint.best_set(run) if which == "best" else None) or checkpoint.latest_set(run)
    return f"step {found.step}" if found else ""
