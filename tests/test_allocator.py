from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from lalia import allocator

#: page faults of filling 64 MiB twenty times over
FAULTS = """
import resource, sys, torch
from lalia.allocator import keep_freed_memory
print(keep_freed_memory())
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.empty(16 * 2**20).fill_(1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif(platform.system() != "Linux" or platform.libc_ver()[0] != "glibc", reason="needs glibc")


def faults(**environment: str) -> tuple[str, int]:
    kept = {name: value for name, value in os.environ.items() if name not in allocator.CHOSEN_BY_USER}
    run = subprocess.run([sys.executable, "-c", FAULTS], env=kept | environment, capture_output=True, text=True, check=True)
    said, count = run.stdout.split()
    return said, int(count)


@glibc
def test_freed_memory_is_used_again() -> None:
    said, kept = faults()
    assert said == "True"
    said, plain = faults(MALLOC_MMAP_THRESHOLD_="131072", MALLOC_TRIM_THRESHOLD_="131072")
    assert said == "False"  # what the user set stays
    assert kept < plain / 2


def test_nothing_happens_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert not allocator.keep_freed_memory()
