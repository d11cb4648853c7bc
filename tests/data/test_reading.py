import io
import json
import logging
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data import reading
from data.images import CorruptImage, ImageTooLarge, open_image
from data.reading import SkipLog, expand_shards, open_shards
from data.sample import Caption, DataError, Sample
from data.shards import ShardWriter

RED = (255, 0, 0)
# each spawned worker imports torch anew, so that one is slow
FORK = pytest.param("fork", marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork"))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(number: int, size: int = 8) -> bytes:
    return encoded(Image.new("RGB", (size, size), (number % 256, number // 256, 7)))


def sample(number: int, **changes) -> Sample:
    fields = {"image": picture(number), "captions": {"en": Caption(f"number {number}", ("figure",))}, **changes}
    return Sample(id=f"s{number:04d}", extension="png", **fields)


def write_shards(folder, count: int, per_shard: int = 10, split: str = "train"):
    with ShardWriter(folder, split, per_shard) as writer:
        for number in range(count):
            writer.write(sample(number))
    return folder


def write_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def ids(dataset) -> list[str]:
    return [example.sample.id for example in dataset]


# pictures


def test_modes_become_rgb():
    square = (4, 4)
    assert open_image(encoded(Image.new("RGB", square, RED))).getpixel((0, 0)) == RED
    assert open_image(encoded(Image.new("L", square, 90))).getpixel((0, 0)) == (90, 90, 90)
    assert open_image(encoded(Image.new("1", square, 1))).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(Image.new("RGBA", square, (255, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(Image.new("RGBA", square, (0, 0, 0, 51)))).getpixel((0, 0)) == (204, 204, 204)
    assert open_image(encoded(Image.new("LA", square, (0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    cmyk = np.asarray(open_image(encoded(Image.new("CMYK", square, (0, 255, 255, 0)), "JPEG")))
    assert np.abs(cmyk.astype(int) - RED).max() < 15
    palette = Image.new("P", square, 1)
    palette.putpalette([1, 2, 3, 255, 0, 0])
    assert open_image(encoded(palette)).getpixel((0, 0)) == RED
    assert open_image(encoded(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert all(
        open_image(encoded(image)).mode == "RGB" for image in (palette, Image.new("LA", square), Image.new("1", square))
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    grey = Image.fromarray(np.array([[0, 257, 257 * 128, 65535]], dtype=np.uint16))
    assert np.asarray(open_image(encoded(grey, kind)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_exif_orientation_and_first_frame():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    assert open_image(encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)).size == (10, 20)
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 255, 0))]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(animated).getpixel((0, 0)) == RED


def test_cap_is_checked_before_decoding():
    huge = encoded(Image.new("1", (5000, 5000)))
    with pytest.raises(ImageTooLarge, match="5000x5000 pixels; the cap is 1000000 pixels"):
        open_image(huge[:200], max_pixels=1_000_000)  # there is nothing to decode after the header
    assert open_image(encoded(Image.new("L", (10, 10))), max_pixels=100).size == (10, 10)


@pytest.mark.parametrize(
    "content", [b"", b"no picture", picture(1)[:40], encoded(Image.new("L", (64, 64)), "JPEG")[:-80]]
)
def test_corrupt_pictures_are_one_line(content):
    with pytest.raises(CorruptImage) as caught:
        open_image(content)
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)  # no address: logs of two runs are equal


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_any_damage_is_corrupt_or_a_picture():
    source = np.random.default_rng(0)
    noise = Image.fromarray(source.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    outcomes = set()
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        good = encoded(noise, kind)
        for _ in range(50):
            damaged = bytearray(good)
            for position in source.integers(0, len(good), 5):
                damaged[position] = source.integers(256)
            try:
                outcomes.add(open_image(bytes(damaged), max_pixels=10**6).mode)
            except DataError as error:
                outcomes.add(type(error).__name__)
    assert outcomes >= {"RGB", "CorruptImage"}
    assert outcomes <= {"RGB", "CorruptImage", "ImageTooLarge"}


# lists of shards


def test_expand_shards(tmp_path):
    write_shards(tmp_path / "a", 25)
    write_shards(tmp_path / "a", 5, split="test-concept")
    folder = tmp_path / "a"
    names = ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    assert [path.name for path in expand_shards(folder, "train")] == names
    assert [path.name for path in expand_shards(folder)] == ["test-concept-00000.tar", *names]
    assert [path.name for path in expand_shards(str(folder / "train-{00000..00002}.tar"))] == names
    assert expand_shards([folder / names[1], str(folder / names[0])]) == [folder / names[1], folder / names[0]]
    assert expand_shards(folder / names[1], "train") == [folder / names[1]]
    write_shards(tmp_path / "mini", 3, split="mini")
    assert len(expand_shards(tmp_path / "mini", "mini")) == 1


def test_img2dataset_names_are_all_train(tmp_path):
    for name in ("00000.tar", "00001.tar"):
        write_tar(tmp_path / name, {"0.jpg": b""})
    assert len(expand_shards(tmp_path, "train")) == 2
    with pytest.raises(DataError, match="holds no test shard; its splits: train"):
        expand_shards(tmp_path, "test")


def test_no_shards_is_an_error(tmp_path):
    write_shards(tmp_path / "a", 1)
    (tmp_path / "empty").mkdir()
    for spec, message in [
        (tmp_path / "none", "no shard or folder of shards at"),
        (tmp_path / "empty", r"holds no \.tar shard"),
        ([], "list of shards is empty"),
        (str(tmp_path / "a" / "train-{00000..00001}.tar"), "train-00001"),
        (str(tmp_path / "{a"), "unbalanced braces"),
    ]:
        with pytest.raises(DataError, match=message):
            expand_shards(spec)
    with pytest.raises(DataError, match="holds no test-family shard; its splits: train"):
        expand_shards(tmp_path / "a", "test-family")


# reading


def test_reads_our_shards_in_order(tmp_path):
    examples = list(open_shards(write_shards(tmp_path, 25)))
    assert [example.sample.id for example in examples] == [f"s{number:04d}" for number in range(25)]
    assert examples[3].image.mode == "RGB"
    assert examples[3].image.getpixel((0, 0)) == (3, 0, 7)
    assert examples[3].sample.captions == {"en": Caption("number 3", ("figure",))}


def test_reads_img2dataset_shards(tmp_path):
    jpeg = encoded(Image.new("RGB", (30, 20), RED), "JPEG")
    record = {"caption": "a red flag", "url": "https://example.org/flag.jpg", "key": "000000001", "width": 30}
    members = {"000000001.jpg": jpeg, "000000001.json": json.dumps(record).encode(), "000000001.txt": b"a red flag"}
    write_tar(tmp_path / "00000.tar", members)
    [example] = open_shards(tmp_path)
    assert example.image.size == (30, 20)
    assert example.sample.captions == {"und": Caption("a red flag")}
    assert example.sample.source == "https://example.org/flag.jpg"


@pytest.fixture
def damaged(tmp_path):
    """Two whole shards, one with bad samples between good ones, one cut short. Seven kinds of damage."""
    folder = write_shards(tmp_path / "damaged", 20)
    good = {f"g{n}.{ext}": content for n in range(2) for ext, content in sample(n).to_members().items()}
    write_tar(
        folder / "train-00002.tar",
        {
            "a.png": b"not a picture", "a.txt": b"corrupt",
            "b.json": b"{}",
            "c.png": picture(1),
            "d.png": picture(1), "d.json": b"{broken",
            "e.png": picture(1, size=200), "e.txt": b"too large",
            **{f"z{name}": content for name, content in good.items()},
        },
    )  # fmt: skip
    write_shards(tmp_path / "other", 10)
    whole = (tmp_path / "other" / "train-00000.tar").read_bytes()
    # cut inside the last picture (members are padded to 512 bytes)
    (folder / "train-00001.tar").write_bytes(whole[: len(whole.rstrip(b"\0")) - 20])
    return folder


def test_damage_is_skipped_counted_and_named(damaged, tmp_path, caplog):
    log = SkipLog(tmp_path / "skipped.log")
    with caplog.at_level(logging.WARNING, logger="data.reading"):
        found = ids(open_shards(damaged, max_pixels=10_000, log=log))
    assert found == [f"s{n:04d}" for n in range(10)] + [f"s{n:04d}" for n in range(9)] + ["s0000", "s0001"]
    expected = {
        reading.BROKEN_SHARD: 1,
        reading.CORRUPT_IMAGE: 1,
        reading.MISSING_CAPTION: 2,
        reading.MISSING_PICTURE: 2,  # b, and the sample at the cut
        reading.TOO_LARGE: 1,
    }
    assert log.counts == expected
    lines = [line.split("\t") for line in (tmp_path / "skipped.log").read_text().splitlines()]
    assert len(lines) == 7
    assert ["picture too large", "train-00002.tar: sample e"] in [line[:2] for line in lines]
    assert "train-00001.tar" in caplog.text
    assert "sample a" in caplog.text


def test_warnings_are_few(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", {f"{n:03d}.png": picture(n) for n in range(50)})
    dataset = open_shards(tmp_path, log=SkipLog(warnings=3))
    with caplog.at_level(logging.WARNING, logger="data.reading"):
        assert ids(dataset) == []
    assert dataset.log.counts == {reading.MISSING_CAPTION: 50}
    assert len(caplog.records) == 4


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"a.png": b"nothing", "a.txt": b"x"}, r"^0\.tar: sample a: not a picture"),
        ({"a.png": picture(1)}, r"^0\.tar: sample a: .*no caption"),
        ({"a.txt": b"x"}, r"^0\.tar: sample a: no member ends in png"),
        ({"a.png": picture(1, size=200), "a.txt": b"x"}, r"^0\.tar: sample a: a picture of 200x200"),
    ],
)
def test_strict_names_the_sample(tmp_path, members, problem):
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(DataError, match=problem):
        list(open_shards(tmp_path, strict=True, max_pixels=10_000))


@pytest.mark.parametrize("cut", ["header", "boundary", "flipped header", "empty", "random bytes"])
def test_every_cut_of_a_shard_is_noticed_once_and_the_epoch_goes_on(tmp_path, cut):
    write_shards(tmp_path, 20)
    shard = tmp_path / "train-00000.tar"
    content = shard.read_bytes()
    with tarfile.open(shard) as tar:
        offset = tar.getmembers()[10].offset  # of the sixth sample
    if cut == "header":
        content = content[: offset + 100]
    elif cut == "boundary":
        content = content[:offset]
    elif cut == "flipped header":
        content = content[: offset + 3] + b"!" + content[offset + 4 :]
    else:
        content = b"" if cut == "empty" else np.random.default_rng(0).bytes(5000)
    shard.write_bytes(content)
    dataset = open_shards(tmp_path)
    expected = 5 if cut in ("header", "boundary", "flipped header") else 0
    assert ids(dataset) == [f"s{n:04d}" for n in [*range(expected), *range(10, 20)]]
    assert dataset.log.counts == {reading.BROKEN_SHARD: 1}
    with pytest.raises(DataError, match="train-00000"):
        list(open_shards(tmp_path, strict=True))


def test_a_shard_that_vanishes_is_skipped(tmp_path):
    dataset = open_shards(write_shards(tmp_path, 20))
    (tmp_path / "train-00000.tar").unlink()
    assert len(ids(dataset)) == 10
    assert dataset.log.counts == {reading.BROKEN_SHARD: 1}


# order


def test_shuffle_depends_on_seed_and_epoch_alone(tmp_path):
    folder = write_shards(tmp_path, 60)
    dataset = open_shards(folder, shuffle=30, seed=3)
    first = ids(dataset)
    assert sorted(first) == [f"s{n:04d}" for n in range(60)]
    assert first != sorted(first)
    assert first == ids(dataset) == ids(open_shards(folder, shuffle=30, seed=3))
    assert first != ids(open_shards(folder, shuffle=30, seed=4))
    dataset.set_epoch(1)
    assert first != ids(dataset)
    dataset.set_epoch(0)
    assert first == ids(dataset)
    assert first == ids(pickle.loads(pickle.dumps(dataset)))


def take(dataset, count: int) -> list[str]:
    return [example.sample.id for example, _ in zip(dataset, range(count), strict=False)]


def test_resampling_is_endless_and_seeded(tmp_path):
    folder = write_shards(tmp_path, 30)
    first = take(open_shards(folder, resampled=True, seed=1), 200)
    assert len(first) == 200
    assert len(set(first)) == 30
    assert first == take(open_shards(folder, resampled=True, seed=1), 200)
    assert first != take(open_shards(folder, resampled=True, seed=2), 200)


def test_resampling_gives_up_when_nothing_can_be_read(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", {"a.txt": b"x"})
    with pytest.raises(DataError, match="no readable sample in 1 shards"):
        next(iter(open_shards(tmp_path, resampled=True)))
    monkeypatch.setattr(reading, "MAX_FAILURES", 20)
    write_tar(tmp_path / "0.tar", {"a.png": b"x", "a.txt": b"x"})
    with pytest.raises(DataError, match="20 pictures in a row cannot be used"):
        next(iter(open_shards(tmp_path, resampled=True)))


def test_nodes_share_out_the_shards(tmp_path, monkeypatch):
    folder = write_shards(tmp_path, 60)
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        parts.append(ids(open_shards(folder, shuffle=5, seed=1)))
    assert [len(part) for part in parts] == [30, 30]
    assert sorted(parts[0] + parts[1]) == [f"s{n:04d}" for n in range(60)]
    assert sorted(ids(open_shards(folder, by_node=False))) == [f"s{n:04d}" for n in range(60)]
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(DataError, match="6 shards cannot feed 7 processes"):
        list(open_shards(folder))
    assert len(take(open_shards(folder, resampled=True), 20)) == 20
    assert len(ids(open_shards(folder, by_node=False))) == 60


def only_id(examples) -> str:
    [example] = examples
    return example.sample.id


@pytest.mark.parametrize("method", [FORK, pytest.param("spawn", marks=pytest.mark.slow)])
def test_dataloader_workers_share_out_the_shards(tmp_path, method):
    folder = write_shards(tmp_path / "shards", 40)
    write_tar(folder / "train-00004.tar", {"a.png": b"x", "a.txt": b"x"})
    log = SkipLog(tmp_path / "skipped.log")
    dataset = open_shards(folder, shuffle=20, log=log)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=1,
        num_workers=2,
        collate_fn=only_id,
        multiprocessing_context=method,
        persistent_workers=True,
    )
    first, again = list(loader), list(loader)
    assert sorted(first) == [f"s{n:04d}" for n in range(40)]
    assert first == again
    dataset.set_epoch(1)  # reaches workers that are already running
    assert first != list(loader)
    assert log.counts == {reading.CORRUPT_IMAGE: 3}  # one an epoch, from whichever worker


def test_the_log_counts_its_own_run_and_must_be_writable(tmp_path):
    path = tmp_path / "skipped.log"
    SkipLog(path).add("reason", "a\nb", "one\ttwo\nthree")
    second = SkipLog(path)
    assert second.counts == {}
    second.add("reason", "c", "\ud800")
    assert second.counts == {"reason": 1}
    assert path.read_text() == "reason\ta b\tone two three\nreason\tc\t\\ud800\n"
    with pytest.raises(DataError, match="cannot write the log"):
        SkipLog(tmp_path / "none" / "skipped.log")


def test_a_negative_buffer_is_refused(tmp_path):
    with pytest.raises(DataError, match="not -1"):
        open_shards(write_shards(tmp_path, 1), shuffle=-1)
