"""From the sample shards in the repository to a picture, by the commands of the README, at tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from data.shards import file_sha256, read_manifest
from mmwudao.cli.app import run

SAMPLE = Path(__file__).parents[2] / "data" / "samples" / "emoji"
PERMISSIVE = {"Apache-2.0", "MIT"}
TINY_LOOP = ["loop.steps=2", "loop.batch_size=4", "loop.warmup=1", "loop.device=cpu", "loop.compile=false"]


def test_the_sample_is_whole_small_and_permissive() -> None:
    from data.reading import open_shards

    manifest = read_manifest(SAMPLE)
    for split, shards in manifest.splits.items():
        for shard in shards:
            assert file_sha256(SAMPLE / shard.file) == shard.sha256, f"{split}: {shard.file}"
        licences = {sample.licence for sample, _ in open_shards(SAMPLE, split)}
        assert licences <= PERMISSIVE
    assert sum(file.stat().st_size for file in SAMPLE.iterdir()) < 3e6


def test_shards_to_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = Path(__file__).parents[2] / "mmwudao" / "configs"
    tokenizer, generator, codes = tmp_path / "t", tmp_path / "g", tmp_path / "codes"
    steps = [
        ["train", "tokenizer", str(configs / "emoji-tokenizer.yaml"), f"data.shards={SAMPLE}", f"loop.out={tokenizer}",
         "loop.minutes=0", "data.image_size=32", "data.in_memory=false", "data.test_pictures=8",
         "model.channels=[8, 8, 8]", "model.codebook_size=32", *TINY_LOOP],
        ["tokenize", str(SAMPLE), "-o", str(codes), "--model", str(tokenizer / "tokenizer"), "--size", "32",
         "--device", "cpu"],
        ["train", "generator", str(configs / "emoji-generator.yaml"), f"data.codes={codes}",
         f"data.text_model={SAMPLE / 'text.model'}", f"data.tokenizer={tokenizer / 'tokenizer'}",
         f"loop.out={generator}", "loop.minutes=0", "data.test_pictures=4", "model.width=32", "model.depth=1",
         "model.heads=2", "sample_every=1", *TINY_LOOP],
        ["assemble", "--tokenizer", str(tokenizer / "tokenizer"), "--generator", str(generator / "generator"), "--text",
         str(SAMPLE / "text.model"), "--name", "tiny", "--image-size", "32", "--styles", "noto", "-o",
         str(tmp_path / "model")],
        ["generate", "ein roter Apfel", "红苹果", "-n", "2", "--style", "noto", "--seed", "3", "--model",
         str(tmp_path / "model"), "--device", "cpu", "-o", str(tmp_path / "out")],
    ]  # fmt: skip
    for step in steps:
        assert run(step) == 0, capsys.readouterr().err
    assert list((generator / "sheets").glob("*.png"))
    grid = Image.open(tmp_path / "out" / "grid.png")
    pictures = sorted(set((tmp_path / "out").glob("*.png")) - {tmp_path / "out" / "grid.png"})
    assert len(pictures) == 4
    assert all(Image.open(picture).size == (32, 32) for picture in pictures)
    assert grid.width >= 64
    assert run(["replay", str(pictures[0]), "-o", str(tmp_path / "again.png"), "--device", "cpu"]) == 0
    assert Image.open(tmp_path / "again.png").tobytes() == Image.open(pictures[0]).tobytes()
