"""Batches side by side: in order, bounded, stopped at once, and with every problem in its place."""

from __future__ import annotations

import io
import tarfile
import threading
import time
from contextlib import closing
from functools import partial

import numpy
import pytest
import torch
from PIL import Image

from data import reading
from data.batches import AHEAD, cores, encode_shards, in_order
from data.reading import Skip
from data.sample import Caption, DataError, Sample
from data.shards import ShardWriter


def picture(number: int, size: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(folder, number, contents):
    """A shard of samples named by their place, with these pictures."""
    with ShardWriter(folder / str(number), "train") as writer:
        for place, content in enumerate(contents):
            writer.write(Sample(f"{number}-{place}", content, "png", {"en": Caption("a picture")}))
    path = folder / f"{number}.tar"
    if contents:
        (folder / str(number) / "train-00000.tar").rename(path)
    else:
        path.write_bytes(bytes(10240))  # an archive without members
    return path


def red(image: Image.Image, sample: Sample) -> int:
    return int(numpy.asarray(image)[0, 0, 0])


def same(reds: list[int]) -> list[int]:
    return reds


def flat(batches):
    return [entry for batch in batches for entry in batch.entries]


# in order


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order_and_work_is_bounded(workers):
    given = []

    def items():
        for number in range(40):
            given.append(number)
            yield number

    def work(number):
        time.sleep(0.001 * (number * 7 % 5))
        return number * number

    for place, result in enumerate(in_order(work, items(), workers)):
        assert result == place * place
        assert len(given) <= place + AHEAD * workers
    assert len(given) == 40


def test_no_items_no_results():
    assert list(in_order(abs, [], 2)) == []


def test_an_error_comes_in_its_turn():
    def work(number):
        if number == 3:
            raise DataError("the third")
        time.sleep(0.01 * (number < 3))  # what comes before is slower
        return number

    results = in_order(work, range(10), 4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="the third"):
        next(results)


def test_an_error_of_the_source_comes_in_its_turn():
    def items():
        yield from range(3)
        raise DataError("the source")

    results = in_order(str, items(), 4)
    assert [next(results) for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(DataError, match="the source"):
        next(results)


def test_threads_share_the_cores_and_end():
    before, threads = threading.active_count(), torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        shares = list(in_order(lambda _: torch.get_num_threads(), range(8), 3))
        assert set(shares) == {2}
        assert torch.get_num_threads() == 6
        with closing(in_order(lambda _: torch.get_num_threads(), range(1000), 9)) as results:
            assert next(results) == 1
            assert torch.get_num_threads() == 6, "the caller's own share stays"
        assert threading.active_count() == before
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [6]
    finally:
        torch.set_num_threads(threads)


def test_closing_drops_what_was_not_begun():
    begun: list[int] = []
    with closing(in_order(begun.append, range(1000), 2)) as results:
        next(results)
    assert len(begun) <= 1 + AHEAD * 2
    assert cores() >= 1


# shards


def test_every_sample_with_its_result_and_every_problem_in_its_place(tmp_path):
    broken = write_shard(tmp_path, 2, [picture(20), picture(21)])
    with tarfile.open(broken) as archive:
        archive.getmembers()
        broken.write_bytes(broken.read_bytes()[: archive.offset])  # all members, without the archive's end
    shards = [
        write_shard(tmp_path, 0, [picture(0), b"no picture", picture(2), picture(3), picture(4)]),
        write_shard(tmp_path, 1, []),
        broken,
        write_shard(tmp_path, 3, [b"no picture"]),
    ]
    calls = []

    def encode(reds):
        calls.append(len(reds))
        return [10 * value for value in reds]

    batches = list(encode_shards(shards, red, encode, batch_size=2, workers=3))
    assert [(batch.shard.name, len(batch.entries), batch.last) for batch in batches] == [
        ("0.tar", 2, False), ("0.tar", 2, False), ("0.tar", 1, True),
        ("1.tar", 0, True),
        ("2.tar", 3, True),
        ("3.tar", 1, True),
    ]  # fmt: skip
    found = [
        entry.reason if isinstance(entry, Skip) else (entry[0].id, entry[0].image, entry[1]) for entry in flat(batches)
    ]
    assert found == [
        ("0-0", None, 0), reading.CORRUPT_IMAGE, ("0-2", None, 20), ("0-3", None, 30), ("0-4", None, 40),
        ("2-0", None, 200), ("2-1", None, 210), reading.BROKEN_SHARD,
        reading.CORRUPT_IMAGE,
    ]  # fmt: skip
    skip = flat(batches)[1]
    assert (skip.name, str(skip.error)) == (
        "0.tar: sample 0-1", "not a picture (the formats read are PNG, WEBP, JPEG, GIF, BMP, TIFF, AVIF)"
    )  # fmt: skip
    assert sorted(calls) == [1, 1, 2, 2], "never an empty batch"


def test_batches_are_worked_on_side_by_side_on_the_cpu_and_in_line_elsewhere(tmp_path):
    shard = write_shard(tmp_path, 0, [picture(number) for number in range(8)])
    meeting = threading.Barrier(2, timeout=60)

    def meet(reds):
        meeting.wait()  # breaks unless two batches are encoded at a time
        return reds

    assert len(flat(encode_shards([shard], red, meet, batch_size=1, workers=2))) == 8
    inside, most = [], []

    def count(reds):
        inside.append(1)
        time.sleep(0.002)
        most.append(len(inside))
        inside.pop()
        return reds

    assert len(flat(encode_shards([shard], red, count, batch_size=1, workers=4, device="cuda:0"))) == 8
    assert max(most) == 1


def test_too_large_pictures_and_errors_of_encode(tmp_path, monkeypatch):
    shard = write_shard(tmp_path, 0, [picture(0), picture(1, size=9), picture(2)])
    monkeypatch.setattr("data.batches.open_image", partial(reading.open_image, max_pixels=50))
    skip = flat(encode_shards([shard], red, same, batch_size=8))[1]
    assert skip.reason == reading.TOO_LARGE

    def refuse(reds):
        raise ValueError("width must be a multiple of 8")

    with pytest.raises(ValueError, match="multiple of 8"):
        flat(encode_shards([shard], red, refuse, batch_size=1, workers=2))


def test_results_may_be_rows_of_an_array(tmp_path):
    shard = write_shard(tmp_path, 0, [picture(number) for number in range(5)])

    def diagonal(reds: list[int]) -> numpy.ndarray:
        return numpy.diag(reds)

    rows = [entry[1] for entry in flat(encode_shards([shard], red, diagonal, batch_size=3, workers=2))]
    assert [row.tolist() for row in rows] == [[0, 0, 0], [0, 1, 0], [0, 0, 2], [3, 0], [0, 4]]


@pytest.mark.parametrize(
    ("batch_size", "workers", "problem"), [(0, None, "one picture, not 0"), (1, 0, "at least one worker")]
)
def test_sizes_below_one_are_refused(batch_size, workers, problem):
    with pytest.raises(DataError, match=problem):
        encode_shards([], red, same, batch_size=batch_size, workers=workers)
