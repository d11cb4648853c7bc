"""How much memory this process can still take."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """The bytes that "256MB", "1.5 GiB" or "1000000" say. Raises `ValueError` for anything else, and for none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get((match[2] or "B").upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(f"{text!r} is no amount of memory: write it as 256MB or 1.5GiB")
    return int(float(match[1]) * unit)


def free_host_bytes() -> int | None:
    """Bytes that can still be allocated on the host: of the machine, of the control group and of the process's limit.

    None where the system does not tell.
    """
    found = []
    with suppress(OSError, ValueError, IndexError):  # Linux
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    if not found:
        with suppress(OSError, ValueError, AttributeError):  # other Unix systems
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError, KeyError):  # no control groups here, or no limit ("max")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        usage = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(usage["file"]))  # the page cache can be freed
    with suppress(ImportError, OSError, ValueError):  # `ulimit -v`, not on Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        if limit != resource.RLIM_INFINITY:
            found.append(max(0, limit - pages * resource.getpagesize()))
    return min(found, default=None)
