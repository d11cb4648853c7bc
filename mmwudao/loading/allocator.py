"""How much freed memory a program keeps; imports nothing heavy, since it must run before the first large tensor.

glibc takes a block of 32 MB or more from the system when it is asked for and gives it back when it is freed, and a
network makes and frees such tensors in every layer. Each time the system hands out pages anew and zeroes them at the
first touch, which took a third of the CPU time of an image tower and two fifths of that of convolutions at 96 px.
"""

from __future__ import annotations

import ctypes
import os

# what glibc's malloc.h calls them, how `environ` does, and our bytes. A model's file or a larger tensor still goes back
# at once; a GiB of free memory at the end of the heap is kept.
LIMITS = {
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**30),
    "MALLOC_TOP_PAD_": (-2, 2**24),
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**28),
}
USERS_OWN = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_MAX_", *LIMITS)


def keep_freed_memory() -> None:
    """Keep freed blocks for the next tensor, here and in child processes, unless the environment says otherwise.

    Does nothing where the C library is not glibc.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if library is None or not hasattr(library, "gnu_get_libc_version") or any(name in os.environ for name in USERS_OWN):
        return
    for name, (parameter, size) in LIMITS.items():
        library.mallopt(parameter, size)
        os.environ[name] = str(size)
