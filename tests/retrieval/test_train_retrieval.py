from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from data.images import to_tensor
from data.sample import Caption, Sample
from data.shards import Manifest, ShardWriter, write_manifest
from data.text import TextTokenizer
from mmwudao.cli.app import run
from retrieval.towers.base import load_towers
from retrieval.towers.multiscale import MultiScaleConfig
from retrieval.training.objectives import ObjectiveConfig
from retrieval.training.pairs import (
    AugmentConfig,
    PairsConfig,
    Pictures,
    RetrievalCaptionConfig,
    augment,
    draw_captions,
)
from retrieval.training.train_towers import InMemoryTowerBatches, RetrievalTrainConfig, StreamedTowerBatches, train
from vqvae.training.config import LoopConfig, TrainingError

SIZE = 16
COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta", "black", "white")
ROOT = Path(__file__).parents[2]


def sample(number: int) -> Sample:
    """A coloured disc: eight concepts, each in many places."""
    rng = random.Random(number)
    image = Image.new("RGB", (SIZE, SIZE), "grey")
    x, y = rng.randint(0, 6), rng.randint(0, 6)
    colour = COLOURS[number % 8]
    ImageDraw.Draw(image).ellipse((x, y, x + 9, y + 9), fill=colour)
    buffer = BytesIO()
    image.save(buffer, "PNG")
    captions = {
        "en": Caption(f"{colour} disc", ("round", colour, "shape")),
        "zh": Caption(f"圆 {colour[::-1]}", ("圆", "颜色")),
    }
    return Sample(f"s{number:03d}", buffer.getvalue(), "png", captions, "noto", f"c{number % 8}", f"c{number % 8}")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval")
    words = [caption.name for number in range(8) for caption in sample(number).captions.values()]
    TextTokenizer.train(words * 5, folder / "text.model", 320)
    written = {}
    for split, numbers in (("train", range(64)), ("test-family", range(64, 80)), ("test-concept", range(80, 88))):
        with ShardWriter(folder / "shards", split) as writer:
            for number in numbers:
                item = sample(number)
                writer.write_members(item.id, item.to_members())
        written[split] = writer.shards
    write_manifest(folder / "shards", Manifest("discs", SIZE, written))
    return folder


def make_config(workspace: Path, out: Path, **changes) -> RetrievalTrainConfig:
    parts = {
        "trunk": "resnet10t",
        "trunk_options": {"channels": [8, 8, 16, 16], "stem_width": 8, "output_stride": 8},
        "text_encoder": {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                         "intermediate_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "embed_dim": 16, "image_size": SIZE, "grids": [1, 2], "head_width": 16, "head_heads": 2, "max_text": 32,
    }  # fmt: skip
    steps = {"steps": 4, "batch_size": 8, "learning_rate": 3e-3, "warmup": 2, "log_every": 1, "eval_every": 2}
    loop = {"out": str(out), "precision": "float32", "device": "cpu", "save_every": 2, **steps}
    return RetrievalTrainConfig(
        data=PairsConfig(**{"shards": str(workspace / "shards"), **changes.pop("data", {})}),
        captions=RetrievalCaptionConfig(**changes.pop("captions", {})),
        model=MultiScaleConfig(**{**parts, **changes.pop("model", {})}),
        objective=ObjectiveConfig(**changes.pop("objective", {})),
        loop=LoopConfig(**{**loop, **changes.pop("loop", {})}),
        text_model=str(workspace / "text.model"),
        **changes,
    )


def logged(out: Path, name: str) -> list[float]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


@pytest.mark.parametrize("name", ["clip", "moco", "siglip"])
def test_learns_colours(workspace: Path, tmp_path: Path, name: str) -> None:
    config = make_config(
        workspace, tmp_path, captions={"per_picture": 2},
        objective={"name": name, "queue": 24, "momentum": 0.9, "temperature": 0.1, "bias": -2.0},
        loop={"steps": 60, "batch_size": 16, "learning_rate": 1e-2, "log_every": 60, "eval_every": 60, "ema": 0.8},
    )  # fmt: skip
    towers = load_towers(train(config))
    for split in ("test-family", "test-concept"):
        assert logged(tmp_path, f"test/{split}/text_recall@1")[-1] >= 0.375, "one of eight is 0.125"
        assert logged(tmp_path, f"test/{split}/image_recall@1")[-1] >= 0.375
        assert logged(tmp_path, f"test/{split}/text_recall@10/zh")
    pictures = Pictures(config.data, "test-family", SIZE)
    scores = towers.encode_text(["red disc"]) @ towers.encode_image(towers.normalise(pictures.pixels / 255)).T
    assert pictures.samples[int(scores.argmax())].concept == "c0"


@pytest.mark.parametrize("name", ["clip", "moco"])
def test_a_resumed_run_is_the_run(workspace: Path, tmp_path: Path, name: str) -> None:
    settings = {"objective": {"name": name, "queue": 10}, "data": {"test": ["test-family"]}}
    whole = train(make_config(workspace, tmp_path / "whole", **settings, loop={"ema": 0.9}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrieval.training.train_towers.measure_split_recall", lambda *_: {})
        patch.setattr("vqvae.training.loop.Loop._done", lambda self: self.progress.step >= 2)
        train(make_config(workspace, tmp_path / "parts", **settings, loop={"ema": 0.9}))
    parts = train(make_config(workspace, tmp_path / "parts", **settings, loop={"ema": 0.9}), resume=True)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert logged(tmp_path / "parts", "train/loss") == logged(tmp_path / "whole", "train/loss")
    with pytest.raises(TrainingError, match="holds a run already"):
        train(make_config(workspace, tmp_path / "whole", **settings))


def test_streamed_and_micro_batches(workspace: Path, tmp_path: Path) -> None:
    settings = {"accumulate": 2, "precision": "bfloat16"}
    data = {"in_memory": False, "shuffle": 8, "test_pictures": 5}
    config = make_config(workspace, tmp_path, data=data, loop=settings, checkpoint_gradients=True)
    load_towers(train(config))
    assert len(logged(tmp_path, "train/loss")) == 4
    towers = load_towers(tmp_path / "towers")
    for kind in (InMemoryTowerBatches, StreamedTowerBatches):
        batches = list(kind(config, towers)(3))
        assert [len(ids) for _, ids in batches] == [4, 4]
        assert [batch.pixels.shape for batch, _ in batches] == [(4, 3, SIZE, SIZE)] * 2


def test_batches_depend_on_the_step_alone(workspace: Path, tmp_path: Path) -> None:
    config = make_config(workspace, tmp_path, captions={"per_picture": 2})
    config.loop.steps = 1
    towers = load_towers(train(config))
    batches = InMemoryTowerBatches(config, towers)
    (first, ids), (again, again_ids), (other, _) = (next(batches(step)) for step in (5, 5, 6))
    assert ids == again_ids
    assert len(set(ids)) == 8
    assert isinstance(first.tokens, torch.Tensor)
    assert isinstance(again.tokens, torch.Tensor)
    assert torch.equal(first.tokens, again.tokens)
    assert first.seed == again.seed != other.seed
    assert len(first.tokens) == 16


def test_a_locked_tower_stays(workspace: Path, tmp_path: Path) -> None:
    start = train(make_config(workspace, tmp_path / "first"))
    before = load_towers(start).state_dict()
    locked = make_config(
        workspace, tmp_path / "second", start_from=str(start), freeze=["trunk", "image_head", "*embeddings"],
        model={"trunk": "ignored, for start_from decides"},
    )  # fmt: skip
    after = load_towers(train(locked)).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if name.startswith(("trunk", "image_head")) or "embeddings" in name]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"loop": {"batch_size": 9, "accumulate": 2}}, "batch_size=9 is not a multiple"),
        ({"loop": {"batch_size": 72}}, "batch_size=72 exceeds the 64 pictures"),
        ({"freeze": ["backbone"]}, "no part 'backbone'"),
        ({"data": {"test": ["test-nothing"]}}, "no test-nothing shard"),
        ({"data": {"exclude_families": ["noto"]}}, "no readable train pictures of the chosen families"),
        ({"start_from": "nowhere"}, "nowhere holds no towers"),
    ],
)
def test_settings_that_do_not_fit(workspace: Path, tmp_path: Path, changes: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        train(make_config(workspace, tmp_path, **changes))


@pytest.mark.parametrize(
    "make",
    [
        lambda: RetrievalCaptionConfig(name=0.8, keywords=0.3),
        lambda: RetrievalCaptionConfig(per_picture=0),
        lambda: PairsConfig(test_pictures=0),
        lambda: PairsConfig(balance=-1.0),
    ],
)
def test_numbers_out_of_range(make) -> None:
    with pytest.raises(ValueError, match="0|1"):
        make()


def test_pictures(workspace: Path) -> None:
    config = PairsConfig(shards=str(workspace / "shards"))
    pictures = Pictures(config, "train", SIZE)
    assert pictures.pixels.shape == (64, 3, SIZE, SIZE)
    assert pictures.pixels.dtype == torch.uint8
    assert len(set(pictures.labels.tolist())) == 8
    assert pictures.labels[0] == pictures.labels[8]
    few = Pictures(config, "train", SIZE, limit=4)
    assert [item.id for item in few.samples] == ["s000", "s016", "s032", "s048"]
    assert pictures.weights(1.0).unique().tolist() == [1 / 8]
    torch.testing.assert_close(
        pictures.pixels[3] / 255, to_tensor(Image.open(BytesIO(sample(3).require_image()))), atol=0, rtol=0
    )


def test_captions() -> None:
    item = sample(0)
    rng = random.Random(0)
    names = RetrievalCaptionConfig(per_picture=2, style=0.0, name=1.0, keywords=0.0)
    several = [draw_captions(item, names, rng) for _ in range(9)]
    assert all(set(pair) == {"red disc", "圆 der"} for pair in several), "two captions, two languages"
    assert len(draw_captions(item, RetrievalCaptionConfig(per_picture=5), rng)) == 5
    styled = Counter("noto" in draw_captions(item, RetrievalCaptionConfig(style=0.5), rng)[0] for _ in range(400))
    assert 150 < styled[True] < 250


def test_augment() -> None:
    pixels = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    none = AugmentConfig(0, 0, 0, 0, 0)
    torch.testing.assert_close(augment(pixels, none, torch.Generator()), pixels, atol=1e-5, rtol=0)

    def drawn(seed: int) -> torch.Tensor:
        return augment(pixels, AugmentConfig(), torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert 0 <= drawn(1).min() <= drawn(1).max() <= 1
    # a plain picture stays plain, whatever moves
    plain = torch.full((2, 3, 12, 12), 0.3)
    torch.testing.assert_close(augment(plain, AugmentConfig(brightness=0, contrast=0), torch.Generator()), plain)


def test_shift_is_of_the_side() -> None:
    """A bright column moves by no more than the shift, and by nearly as much for some draw."""
    column = torch.zeros(64, 3, 20, 20)
    column[..., 10] = 1
    moved = augment(column, AugmentConfig(shift=0.25, scale=0, rotation=0, brightness=0, contrast=0), torch.Generator())
    places = (moved.mean(dim=(1, 2)) * torch.arange(20)).sum(dim=1) / moved.mean(dim=(1, 2)).sum(dim=1)
    distance = (places - 10).abs()
    assert 4 < distance.max() <= 5.01


def test_command_line(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "towers.yaml"
    record = json.loads(json.dumps(asdict(make_config(workspace, tmp_path / "run"))))
    path.write_text(yaml.safe_dump(record))
    assert run(["train", "retrieval", str(path), "loop.steps=1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "run" / "towers")
    assert run(["train", "retrieval", str(path), "objective.name=triplet"]) == 2
    assert "error: objective.name" in capsys.readouterr().err
    assert run(["train", "retrieval", str(path), "model.nonsense=1"]) == 2
    assert "error: unknown key model.nonsense" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes(workspace: Path, tmp_path: Path) -> None:
    config = make_config(workspace, tmp_path / "two", objective={"name": "moco", "queue": 10}, loop={"ema": 0.9})
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "mmwudao", "train", "retrieval", str(path)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(logged(tmp_path / "two", "train/loss")) == 4
    load_towers(tmp_path / "two" / "towers")
