"""One group of processes writes into the folder of a run."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.training import make_loop, weights
from vqvae.training.config import TrainingError
from vqvae.training.lease import Lease


def quick(folder: Path, patience: float = 0.6) -> Lease:
    return Lease(folder, beat=0.05, patience=patience)


def write(folder: Path, number: int, **record) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"lease-{number:06d}.json").write_text(json.dumps(record))


def test_who_leaves_makes_room_at_once(tmp_path):
    first, second = quick(tmp_path, 1000), quick(tmp_path, 1000)
    first.claim()
    assert first.number == 1
    first.check()
    first.release()
    second.claim()
    assert second.number == 2
    with pytest.raises(TrainingError, match="took over"):
        first.check()
    second.release()


def test_a_second_group_that_believes_itself_alone_refuses(tmp_path):
    first = quick(tmp_path)
    first.claim()
    with pytest.raises(TrainingError, match="another group of processes trains in") as error:
        quick(tmp_path).claim()
    assert "\n" not in str(error.value)
    first.check()
    first.release()


def test_a_group_on_a_lost_machine_is_waited_for(tmp_path):
    write(tmp_path, 7, host="elsewhere", process=1, written=0, left=False)
    lease, started = quick(tmp_path), time.monotonic()
    lease.claim()
    assert time.monotonic() - started >= 0.6
    assert lease.number == 8
    lease.release()


def test_a_group_that_comes_back_writes_no_more(tmp_path):
    """A machine that slept: its lease is taken meanwhile."""
    loop = make_loop(tmp_path)
    loop.checkpointer.claim()
    loop._save()
    loop.checkpointer.check(wait=True)
    before = (tmp_path / "checkpoints" / "latest").read_text()
    write(tmp_path / "checkpoints", 9, host="elsewhere", process=1, written=0, left=False)
    loop.progress.step = 5
    loop._save()
    with pytest.raises(TrainingError, match="took over"):
        loop.checkpointer.check(wait=True)
    loop.checkpointer.release()
    assert (tmp_path / "checkpoints" / "latest").read_text() == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == [before.strip()]


def test_a_group_that_was_killed_makes_room_at_once(tmp_path):
    code = "import sys; from pathlib import Path; from vqvae.training.lease import Lease; "
    code += "import os, signal; Lease(Path(sys.argv[1])).claim(); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    lease, started = Lease(tmp_path, patience=1000), time.monotonic()
    lease.claim()
    assert lease.number == 2
    assert time.monotonic() - started < 60
    lease.release()


def test_of_several_that_come_at_once_one_stays(tmp_path):
    write(tmp_path, 3, host="elsewhere", process=1, written=0, left=True)
    leases = [quick(tmp_path) for _ in range(8)]

    def claims(lease: Lease) -> bool:
        try:
            lease.claim()
        except TrainingError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claims, leases))
    assert won.count(True) == 1
    winner = leases[won.index(True)]
    winner.check()
    winner.release()


def test_a_run_that_another_group_trains_is_left_alone(tmp_path):
    first = make_loop(tmp_path, steps=4)
    kept = weights(first.run())
    write(tmp_path / "checkpoints", 5, host="elsewhere", process=1, written=0, left=False)
    loop = make_loop(tmp_path, steps=8)
    loop.checkpointer.lease = quick(tmp_path / "checkpoints", 5)  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as pool:

        def sign() -> None:
            for beat in range(5):
                time.sleep(0.1)
                write(tmp_path / "checkpoints", 5, beat=beat)

        signs = pool.submit(sign)
        with pytest.raises(TrainingError, match="another group"):
            loop.run(resume=True)
        signs.result()
    again = make_loop(tmp_path, steps=4)
    again.checkpointer.lease = quick(tmp_path / "checkpoints")  # type: ignore[attr-defined]
    assert weights(again.run(resume=True)).equal(kept)
