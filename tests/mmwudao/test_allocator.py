"""Freed memory stays with the program: the pages of a large block are handed out by the system once."""

import ctypes
import os
import subprocess
import sys

import pytest

from mmwudao.loading.allocator import LIMITS

GLIBC = os.name == "posix" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
BLOCKS = """
import os, resource, sys
from mmwudao.loading.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
block = bytearray(b"x") * 2**26
del block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    block = bytearray(b"x") * 2**26
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, os.environ.get("MALLOC_TOP_PAD_"))
"""
PAGES = 4 * 2**26 // 4096  # of the four blocks


def _run(mode: str, **environment: str) -> tuple[int, str]:
    own = {name: value for name, value in os.environ.items() if name not in LIMITS}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS, mode], env=own | environment, capture_output=True, text=True, check=True
    )
    faults, seen = done.stdout.split()
    return int(faults), seen


@pytest.mark.skipif(not GLIBC, reason="only glibc is asked to keep memory")
def test_a_freed_block_is_used_again() -> None:
    assert _run("leave")[0] > PAGES // 2
    faults, inherited = _run("keep")
    assert faults < PAGES // 100
    assert inherited == str(LIMITS["MALLOC_TOP_PAD_"][1])


@pytest.mark.skipif(not GLIBC, reason="only glibc is asked to keep memory")
def test_what_the_user_set_stays() -> None:
    faults, seen = _run("keep", MALLOC_TRIM_THRESHOLD_="1048576")
    assert faults > PAGES // 2
    assert seen == "None"
