"""Which group of processes may write into the folder of a run.

After a break in a network, `torchrun` may form a second group that believes itself alone, and both would write. So a
group takes a lease: a file with the next number, which only one can create, and which it writes again every few
seconds. The highest number owns the folder. Who finds a lease that is still written again leaves; who finds one that is
not, because its machine was lost, takes the next number, and the old group, should it come back, writes no more.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.atomic import write_file
from data.records import parse_json
from vqvae.training.config import TrainingError

BEAT = 3.0  # seconds between two signs of life
PATIENCE = 20.0  # seconds without one, after which the owner counts as lost


class Lease:
    """The lease of `folder`, kept by one process of the group, in a thread; `number` grows with every owner."""

    def __init__(self, folder: Path, beat: float = BEAT, patience: float = PATIENCE) -> None:
        self.folder, self.beat, self.patience = folder, beat, patience
        self.number = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def claim(self) -> None:
        """Become the owner, at once where the last one has left or died on this machine, else once it seems lost.

        Raises `TrainingError` where another group is alive.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            last = self._last()
            if last and not self._is_lost(last):
                owner = self._read(last)
                raise TrainingError(
                    f"another group of processes trains in {self.folder.parent} (process {owner.get('process')} on "
                    f"{owner.get('host')}): stop it, or choose another out="
                )
            self.number = last + 1
            try:
                with self._path(self.number).open("x", encoding="utf-8") as file:
                    file.write(self._content())
            except FileExistsError:
                continue  # another group was faster: look whether it lives
            break
        for number in range(max(1, last - 8), self.number):
            self._path(number).unlink(missing_ok=True)
        self._ended.clear()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises `TrainingError` if the folder has another owner by now."""
        if self._last() != self.number:
            raise TrainingError(
                f"another group of processes took over {self.folder.parent}, as this one seemed lost: it stops here"
            )

    def release(self) -> None:
        """Leave the folder to the next one; the file stays, so that numbers grow."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        self._thread = None
        if self._last() == self.number:
            with suppress(OSError):  # a full disk: the next owner finds this process dead instead
                write_file(self._path(self.number), self._content(left=True).encode())

    def _keep(self) -> None:
        while not self._ended.wait(self.beat):
            with suppress(OSError):  # a full disk tells itself where it matters, at the next checkpoint
                if self._last() == self.number:
                    write_file(self._path(self.number), self._content().encode())

    def _is_lost(self, number: int) -> bool:
        """Whether the owner of that number has left, is dead, or gives no sign of life; waits for one."""
        found = self._read(number)
        if found.get("left") or (found.get("host") == _host() and not _alive(found.get("process"))):
            return True
        until = time.monotonic() + self.patience
        while time.monotonic() < until:
            time.sleep(min(self.beat, self.patience) / 4)
            now = self._read(number)
            if now.get("left") or self._last() != number:
                return self._last() == number
            if now != found:
                return False
        return True

    def _last(self) -> int:
        numbers = [path.stem.partition("-")[2] for path in self.folder.glob("lease-*.json")]
        return max((int(number) for number in numbers if number.isdigit()), default=0)

    def _path(self, number: int) -> Path:
        return self.folder / f"lease-{number:06d}.json"

    def _read(self, number: int) -> dict[str, Any]:
        try:
            found = parse_json(self._path(number).read_bytes())
        except (OSError, ValueError):  # it is being replaced, or a loss of power emptied it
            return {}
        return found if isinstance(found, dict) else {}

    def _content(self, left: bool = False) -> str:
        record = {"host": _host(), "process": os.getpid(), "run": os.environ.get("TORCHELASTIC_RUN_ID", "")}
        return json.dumps({**record, "written": time.time(), "left": left})


def _host() -> str:
    """The machine, and the space of process numbers on it, which containers have of their own."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid") + Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    return f"{platform.node()} {space}".strip()


def _alive(process: object) -> bool:
    if not isinstance(process, int):
        return True  # not known
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    with suppress(OSError, IndexError):  # dead, but nobody asked for its exit code yet
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True
