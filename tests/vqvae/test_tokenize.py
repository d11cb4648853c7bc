import io
import multiprocessing
import os
import signal
import threading
from dataclasses import replace

import numpy
import pytest
import torch
from PIL import Image

from data.augment import draw_view, view_square
from data.codes import read_codes, tokenizer_hash
from data.images import open_image, to_square, to_tensor
from data.sample import Caption, DataError, Question, Sample
from data.shards import Manifest, ShardWriter, read_manifest, write_manifest
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.storage.parts import content_hash
from vqvae.tokenize import TokenizeSettings, tokenize_image, tokenize_shards


@pytest.fixture
def model() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(VQVAEConfig(channels=[4, 8], residual_blocks=1, code_dim=4, codebook_size=64)).eval()


def picture(number: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    rng = numpy.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), numpy.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def sample(number: int, image: bytes | None = None) -> Sample:
    captions = {"en": Caption(f"number {number}", ("noise",))}
    return Sample(f"s.{number}", image or png(picture(number)), "png", captions, family="noise", base_concept="n")


def write_shards(folder, train, test=()):
    splits = {}
    for split, samples in (("train", train), ("test", test)):
        with ShardWriter(folder, split, 3) as writer:
            for item in samples:
                writer.write(item)
        splits[split] = writer.shards
    write_manifest(folder, Manifest("noise", 16, splits, {"by": "hand"}))
    return folder


def settings(image_size: int = 16, **changes) -> TokenizeSettings:
    return TokenizeSettings(image_size, progress=False, **changes)


def test_one_picture(model, tmp_path):
    picture(1).save(tmp_path / "a.png")
    found = tokenize_image(model, tmp_path / "a.png")
    pixels = to_tensor(picture(1)).unsqueeze(0)
    assert torch.equal(found.codes, model.encode(pixels)[0])
    restored = model.decode(found.codes.unsqueeze(0))[0]
    assert found.restored.size == (16, 16)
    assert float((to_tensor(found.restored) - restored).abs().max()) <= 0.5 / 255 + 1e-6
    assert found.psnr == pytest.approx(-10 * float((restored - pixels[0]).square().mean().log10()), abs=1e-3)


def test_a_picture_is_cut_to_the_stride_or_resized(model, tmp_path):
    picture(1, (27, 18)).save(tmp_path / "a.png")
    assert tokenize_image(model, tmp_path / "a.png").codes.shape == (4, 6)
    assert tokenize_image(model, tmp_path / "a.png", 32).codes.shape == (8, 8)


def test_pictures_that_cannot_be_tokenized(model, tmp_path):
    picture(1, (3, 18)).save(tmp_path / "thin.png")
    with pytest.raises(DataError, match="3x18 pixels; at least 4x4"):
        tokenize_image(model, tmp_path / "thin.png")
    (tmp_path / "bad.png").write_bytes(b"text")
    with pytest.raises(DataError, match="not a picture"):
        tokenize_image(model, tmp_path / "bad.png")


def test_shards_to_codes_and_back(model, tmp_path):
    shards = write_shards(tmp_path / "shards", map(sample, range(7)), map(sample, range(7, 9)))
    name = content_hash(model)
    manifest = tokenize_shards(model, shards, tmp_path / "codes", settings(batch_size=4))
    assert manifest == read_manifest(tmp_path / "codes")
    assert (manifest.samples("train"), manifest.samples("test")) == (7, 2)
    assert manifest.sources == {"by": "hand", "tokenizer": name}
    assert manifest.skipped == {}
    assert tokenizer_hash(tmp_path / "codes") == name
    for split, numbers in (("train", range(7)), ("test", range(7, 9))):
        for coded, number in zip(read_codes(tmp_path / "codes", split), numbers, strict=True):
            assert coded.codes.dtype == numpy.uint16
            codes = model.encode(to_tensor(picture(number)).unsqueeze(0))
            assert numpy.array_equal(coded.codes, codes[0])
            assert coded.sample.id == f"s.{number}"
            assert coded.sample.captions == sample(number).captions
            assert model.decode(torch.from_numpy(coded.codes.astype(int)).unsqueeze(0)).shape == (1, 3, 16, 16)


def test_a_picture_with_questions_needs_no_caption(model, tmp_path):
    asked = replace(sample(1), captions={}, questions=(Question("en", "red?", "no"),))
    bare = replace(sample(2), captions={})
    manifest = tokenize_shards(model, write_shards(tmp_path / "shards", [asked, bare]), tmp_path / "codes", settings())
    assert [coded.sample.questions for coded in read_codes(tmp_path / "codes", "train")] == [asked.questions]
    assert sum(manifest.skipped.values()) == 1


def test_pictures_are_resized(model, tmp_path):
    shards = write_shards(tmp_path / "shards", [sample(1, png(picture(1, (40, 24))))])
    tokenize_shards(model, shards, tmp_path / "codes", settings(image_size=24))
    (coded,) = read_codes(tmp_path / "codes", "train")
    expected = model.encode(to_tensor(to_square(picture(1, (40, 24)), 24)).unsqueeze(0))[0]
    assert numpy.array_equal(coded.codes, expected)
    assert read_manifest(tmp_path / "codes").image_size == 24


def test_neither_batch_nor_shard_size_nor_repetition_changes_codes(model, tmp_path):
    shards = write_shards(tmp_path / "shards", map(sample, range(7)))
    for name, batch_size, per_shard in (("a", 7, 100), ("b", 2, 3), ("c", 7, 100)):
        tokenize_shards(model, shards, tmp_path / name, settings(batch_size=batch_size, samples_per_shard=per_shard))
    grids = {name: [c.codes.tolist() for c in read_codes(tmp_path / name, "train")] for name in "abc"}
    assert grids["a"] == grids["b"]
    assert read_manifest(tmp_path / "a") == read_manifest(tmp_path / "c")
    assert len(read_manifest(tmp_path / "b").splits["train"]) == 3


def test_a_bfloat16_tokenizer_keeps_its_name(model, tmp_path):
    model = model.bfloat16()
    name = content_hash(model)
    shards = write_shards(tmp_path / "shards", [sample(1)])
    manifest = tokenize_shards(model, shards, tmp_path / "codes", settings())
    assert manifest.sources["tokenizer"] == name


def test_more_codes_than_uint16_holds(tmp_path):
    big = VQVAE(VQVAEConfig(channels=[4, 8], residual_blocks=0, code_dim=2, codebook_size=70_000))
    shards = write_shards(tmp_path / "shards", [sample(1)])
    tokenize_shards(big, shards, tmp_path / "codes", settings())
    (coded,) = read_codes(tmp_path / "codes", "train")
    assert coded.codes.dtype == numpy.int32
    assert numpy.array_equal(coded.codes, big.encode(to_tensor(picture(1)).unsqueeze(0))[0])


def test_a_corrupt_picture_is_skipped_and_counted(model, tmp_path):
    bad = sample(1, png(picture(1))[:60])
    shards = write_shards(tmp_path / "shards", [sample(0), bad, sample(2), sample(3)])
    manifest = tokenize_shards(model, shards, tmp_path / "codes", settings(batch_size=2))
    assert manifest.samples("train") == 3
    assert manifest.skipped == {"corrupt image": 1}
    assert [coded.sample.id for coded in read_codes(tmp_path / "codes", "train")] == ["s.0", "s.2", "s.3"]


def test_strict_stops_and_leaves_nothing(model, tmp_path):
    shards = write_shards(tmp_path / "shards", [sample(0), sample(1, png(picture(1))[:60])])
    with pytest.raises(DataError, match=r"s.1"):
        tokenize_shards(model, shards, tmp_path / "codes", settings(strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_the_output_is_not_overwritten(model, tmp_path):
    shards = write_shards(tmp_path / "shards", [sample(0)])
    (tmp_path / "codes").mkdir()
    tokenize_shards(model, shards, tmp_path / "codes", settings())  # an empty folder is fine
    before = read_manifest(tmp_path / "codes")
    with pytest.raises(DataError, match="exists and is not empty"):
        tokenize_shards(model, shards, tmp_path / "codes", settings())
    assert read_manifest(tmp_path / "codes") == before


def test_a_folder_without_manifest(model, tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json"):
        tokenize_shards(model, tmp_path, tmp_path / "codes", settings())
    assert list(tmp_path.iterdir()) == []


# side by side


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_any_number_of_workers_writes_the_same_bytes(model, tmp_path):
    items = [sample(number) for number in range(20)]
    items[7] = sample(7, png(picture(7))[:60])
    items[12] = sample(12, b"no picture")
    shards = write_shards(tmp_path / "shards", items, [sample(20), sample(21, b"x")])
    cut = shards / "train-00003.tar"
    cut.write_bytes(cut.read_bytes()[:4096])
    for workers in (1, 2, 5):
        out = tmp_path / str(workers)
        tokenize_shards(model, shards, out, settings(batch_size=2, workers=workers))
        assert contents(out) == contents(tmp_path / "1")
    lines = (tmp_path / "5" / "skipped.log").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [
        "corrupt image", "missing picture", "truncated or broken shard", "corrupt image", "corrupt image"
    ]  # fmt: skip


def test_strict_names_the_first_of_several(model, tmp_path):
    items = [sample(number) for number in range(9)]
    items[5] = sample(5, b"no picture")
    items[7] = Sample("s.7", png(picture(7)), "png")  # read before the fifth is decoded
    shards = write_shards(tmp_path / "shards", items)
    with pytest.raises(DataError, match=r"sample s.5: not a picture"):
        tokenize_shards(model, shards, tmp_path / "codes", settings(batch_size=1, workers=4, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_ctrl_c_leaves_nothing(model, tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "shards", map(sample, range(40)))
    before, encode, calls = threading.active_count(), model.encode, []

    def interrupted(pixels):
        calls.append(len(pixels))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return encode(pixels)

    monkeypatch.setattr(model, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize_shards(model, shards, tmp_path / "codes", settings(batch_size=1, workers=2))
    assert 3 <= len(calls) < 40
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
    assert threading.active_count() == before
    assert not multiprocessing.active_children()


def test_a_size_that_the_model_cannot_take(model, tmp_path):
    shards = write_shards(tmp_path / "shards", map(sample, range(8)))
    with pytest.raises(ValueError, match="a multiple of 4: not 18"):
        tokenize_shards(model, shards, tmp_path / "codes", settings(image_size=18, batch_size=1, workers=3))
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_an_empty_shard_between_others(model, tmp_path):
    shards = write_shards(tmp_path / "shards", map(sample, range(9)))
    (shards / "train-00001.tar").write_bytes(bytes(10240))
    manifest = tokenize_shards(model, shards, tmp_path / "codes", settings(workers=2))
    assert (manifest.samples("train"), manifest.skipped) == (6, {})
    assert [coded.sample.id for coded in read_codes(tmp_path / "codes", "train")] == [
        "s.0", "s.1", "s.2", "s.6", "s.7", "s.8"
    ]  # fmt: skip


def test_draft_decodes_large_jpegs_smaller_and_says_so(model, tmp_path):
    large = Image.linear_gradient("L").convert("RGB")  # 256 px
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", quality=95)
    captions = {"en": Caption("a gradient")}
    shards = write_shards(tmp_path / "shards", [Sample("a", buffer.getvalue(), "jpg", captions), sample(1)])
    tokenize_shards(model, shards, tmp_path / "codes", settings())
    manifest = tokenize_shards(model, shards, tmp_path / "draft", settings(draft=True))
    assert manifest.sources["decoding"] == "draft"
    assert "decoding" not in read_manifest(tmp_path / "codes").sources
    whole, (first, second) = (list(read_codes(tmp_path / name, "train")) for name in ("codes", "draft"))
    assert numpy.array_equal(second.codes, whole[1].codes)
    small = open_image(buffer.getvalue(), least_side=32)
    assert small.size == (32, 32)
    assert numpy.array_equal(first.codes, model.encode(to_tensor(to_square(small, 16)).unsqueeze(0))[0])


def test_other_views_are_stored_for_the_training_split_alone(model, tmp_path):
    shards = write_shards(tmp_path / "shards", [sample(n) for n in range(5)], [sample(n) for n in range(5, 8)])
    plain, augmented = tmp_path / "plain", tmp_path / "augmented"
    tokenize_shards(model, shards, plain, settings(batch_size=2))
    manifest = tokenize_shards(model, shards, augmented, settings(batch_size=2, augment=3))
    assert manifest.sources["views"] == "3 of train"
    for split in ("train", "test"):
        for one, other in zip(read_codes(plain, split), read_codes(augmented, split), strict=True):
            assert one.sample == other.sample
            assert numpy.array_equal(one.codes, other.codes)
            assert one.views is None
            if split == "test":
                assert other.views is None
                continue
            assert other.views is not None
            assert other.views.shape == (3, 4, 4)
            square = view_square(picture(int(one.sample.id[2:])), 16, draw_view(one.sample, 1))
            assert numpy.array_equal(other.views[1], model.encode(to_tensor(square)[None])[0].numpy())
    again = tmp_path / "again"
    tokenize_shards(model, shards, again, settings(batch_size=2, augment=3, workers=3))
    assert (again / "train-00000.tar").read_bytes() == (augmented / "train-00000.tar").read_bytes()
    with pytest.raises(DataError, match="views of the split 'practice': there is none"):
        tokenize_shards(model, shards, tmp_path / "none", settings(augment=1, augment_split="practice"))
