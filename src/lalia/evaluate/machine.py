"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch


def machine() -> dict[str, str]:
    """Processor, cores, threads, memory, operating system and versions, as words for a report."""
    facts = {
        "Processor": processor(),
        "Cores": f"{os.cpu_count()} ({torch.get_num_threads()} torch threads)",
        "Memory": _memory(),
        "Accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "Operating system": platform.platform(terse=True),
        "Versions": f"Lalia {_version('lalia')}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"numpy {_version('numpy')}, transformers {_version('transformers')}",
    }
    return {name: value for name, value in facts.items() if value}


def processor() -> str:
    """The processor's model name where the system tells it, its architecture otherwise."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(source tree)"
