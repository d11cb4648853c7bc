"""Training of the generator from codes to a folder."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy
import pytest
import torch
import yaml

from data.config import ConfigError, load_config
from data.text import TextTokenizer
from generation.captions import caption_log_probabilities
from generation.drawing.decoding import generate_codes
from generation.drawing.sampling import SamplingOptions
from generation.rows.draw import training_row
from generation.rows.row import collate
from generation.rows.texts import CaptionMix, draw_caption
from generation.training.batches import RowBatches
from generation.training.config import GeneratorTrainConfig
from generation.training.pairs import CodedPairs, unigram_bits
from generation.training.train_generator import train
from generation.transformer.model import Transformer
from tests.helpers.tiny_codes import CODES, coded, logged, make_config, write_workspace
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.storage.parts import load_part, save_part
from vqvae.training.config import TrainingError


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return write_workspace(tmp_path_factory.mktemp("generator"))


def test_training_from_codes_to_a_folder(workspace, tmp_path):
    config = make_config(
        workspace, tmp_path / "run", data={"tokenizer": str(workspace / "tokenizer")}, ema=0.9,
        steps=60, learning_rate=2e-2, log_every=20, eval_every=30,
    )  # fmt: skip
    config.sample_prompts, config.sample_every = ["red 1", "", "红 2, noto 风格"], 30
    folder = train(config)
    assert folder == tmp_path / "run" / "generator"
    model = load_part(Transformer, folder)
    text = TextTokenizer(workspace / "text.model")
    assert (
        model.config.tokenizer_hash
        == json.loads((workspace / "codes" / "manifest.json").read_text())["sources"]["tokenizer"]
    )
    assert model.config.text_hash == text.content_hash
    assert (model.config.num_image_codes, model.config.num_text_pieces) == (CODES, text.vocab_size)
    assert model.config.grid == (4, 4)
    out = tmp_path / "run"
    for split in ("test-family", "test-concept"):
        bits, baseline = logged(out, f"test/{split}/image_bits"), logged(out, f"test/{split}/unigram_bits")
        assert len(bits) == 2
        assert bits[-1] < bits[0]
        assert bits[-1] < baseline[-1] - 1
        tests = CodedPairs(workspace / "codes", split)
        assert baseline == pytest.approx(
            [unigram_bits(CodedPairs(workspace / "codes", "train"), tests, CODES)] * 2, rel=1e-5
        )
    assert [path.name for path in sorted((out / "sheets").iterdir())] == ["000030.png", "000060.png"]


def test_held_out_bits_are_the_mean_over_pictures(workspace, tmp_path):
    # no learning; 40 pictures, which make batches of 32 and 8
    config = make_config(workspace, tmp_path / "run", data={"test": ["train"]}, steps=1, learning_rate=0.0)
    folder = train(config)
    (found,) = logged(tmp_path / "run", "test/train/image_bits")
    sizes = load_part(Transformer, folder).config
    torch.manual_seed(config.loop.seed)
    model = Transformer(sizes).eval()
    text, pairs = TextTokenizer(workspace / "text.model"), CodedPairs(workspace / "codes", "train")
    fixed = CaptionMix(name=1.0, keywords=0.0, style=1.0, dropout=0.0)
    bits = []
    with torch.no_grad():
        for item, codes in zip(pairs.samples, pairs.codes, strict=True):
            ids = text.encode(draw_caption(item, fixed, random.Random(item.id)).text)
            row = training_row(model.config.vocabulary, ids, codes, model.config.max_text, model.config.position_kind)
            bits.append(float(model.loss(collate(model.config.vocabulary, [row]))["image_bits"]))
    assert found == pytest.approx(sum(bits) / len(bits), rel=1e-5)


def test_accumulation_is_one_large_batch(workspace, tmp_path):
    for accumulate in (1, 4):
        train(make_config(workspace, tmp_path / str(accumulate), accumulate=accumulate))
    losses = [logged(tmp_path / name, "train/loss") for name in ("1", "4")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("options", [{"packing": True}, {"checkpoint_gradients": True}], ids=lambda o: next(iter(o)))
def test_options_of_speed_change_no_loss(workspace, tmp_path, options):
    found = []
    for name, changes in (("without", {"packing": False}), ("with", {"packing": False, **options})):
        config = make_config(workspace, tmp_path / name, accumulate=2)
        train(replace(config, mix={"draw": 0.5, "describe": 0.5}, given_codes=0.5, **changes))
        found.append([logged(tmp_path / name, f"train/{figure}") for figure in ("loss", "image_bits", "caption_bits")])
    assert all(found[0])
    for without, with_option in zip(*found, strict=True):
        assert with_option == pytest.approx(without, rel=1e-4)


def test_a_resumed_training_is_the_uninterrupted_one(workspace, tmp_path, monkeypatch):
    whole = train(make_config(workspace, tmp_path / "whole", ema=0.9))
    with monkeypatch.context() as patch:
        draw = RowBatches.__call__

        def interrupted(self, step):
            if (tmp_path / "run" / "checkpoints" / "latest").is_file():
                raise KeyboardInterrupt
            return draw(self, step)

        patch.setattr(RowBatches, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(workspace, tmp_path / "run", ema=0.9, save_every=3, save_in_background=False))
    with pytest.raises(TrainingError, match="--resume"):
        train(make_config(workspace, tmp_path / "run", ema=0.9))
    resumed = train(make_config(workspace, tmp_path / "run", ema=0.9), resume=True)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_generator_learns_to_fill_holes(workspace, tmp_path):
    loop = {"steps": 120, "batch_size": 16, "learning_rate": 1e-2, "eval_every": 60, "log_every": 60}
    config = replace(make_config(workspace, tmp_path, model={"width": 32}, **loop), code_noise=0.2)
    folder = train(replace(config, mix={"draw": 1, "fill": 1}))
    (unseen,) = logged(tmp_path, "test/test-family/fill_bits")[:1]
    bits = logged(tmp_path, "test/test-family/fill_bits")[-1]
    assert bits < unseen
    assert logged(tmp_path, "train/fill_bits")[-1] < 1
    model = load_part(Transformer, folder)
    assert model.config.fills
    # what a kept code in the last row tells of the whole picture, no caption does
    given = torch.full((3, 4, 4), -1)
    given[:, 2, 1] = torch.tensor([3, 5, 6])
    options = SamplingOptions(temperature=0)
    drawn = generate_codes(model, [[]] * 3, [0] * 3, options, grid=(4, 4), given_codes=given).flatten(1)
    assert (drawn[:, :15] == given[:, 2, 1, None]).float().mean() > 0.8
    # it goes on without holes, and says so
    again = replace(config, start_from=str(folder), loop=replace(config.loop, out=str(tmp_path / "again"), steps=1))
    assert not load_part(Transformer, train(again)).config.fills


def test_one_generator_learns_both_directions(workspace, tmp_path):
    loop = {"steps": 160, "batch_size": 16, "learning_rate": 1e-2, "eval_every": 80, "log_every": 80}
    captions = {"name": 1.0, "keywords": 0.0}
    config = make_config(workspace, tmp_path, captions=captions, model={"width": 32}, **loop)
    folder = train(replace(config, mix={"draw": 1, "describe": 1}))
    first, last = logged(tmp_path, "test/test-family/caption_bits")
    assert last < first < 3
    images = logged(tmp_path, "test/test-family/image_bits")
    assert images[-1] < images[0]
    # a caption is likelier for the picture that it describes than for others
    model, text = load_part(Transformer, folder).float(), TextTokenizer(workspace / "text.model")
    codes = torch.stack([torch.from_numpy(coded(number).codes.astype(numpy.int64)) for number in range(8)])
    scores = torch.stack([caption_log_probabilities(model, codes, text.encode(f"en: red {n}")) for n in range(8)])
    assert float(scores.diagonal().mean() - scores.mean()) > 0.5


def test_the_mixture_is_read_and_checked_with_the_configuration():
    assert load_config(GeneratorTrainConfig, None, ["mix={draw: 1, describe: 3}"]).mix == {"draw": 1, "describe": 3}
    with pytest.raises(ConfigError, match="unknown kind of rows 'sing'; use draw, describe, fill, answer, match$"):
        load_config(GeneratorTrainConfig, None, ["mix.sing=1"])
    with pytest.raises(ConfigError, match=r"unknown key captions\.image_first"):
        load_config(GeneratorTrainConfig, None, ["captions.image_first=0.5"])


def test_training_starts_from_a_trained_generator(workspace, tmp_path):
    folder = train(make_config(workspace, tmp_path / "first", steps=40))
    again = make_config(workspace, tmp_path / "second", steps=1, learning_rate=1e-9, eval_every=1)
    again.start_from = str(folder)
    train(again)
    before, after = (logged(tmp_path / run, "test/test-family/image_bits")[-1] for run in ("first", "second"))
    assert after == pytest.approx(before, abs=0.02)  # it was stored in bfloat16
    other = make_config(workspace, tmp_path / "third", model={"width": 32})
    other.start_from = str(folder)
    with pytest.raises(ConfigError, match="another configuration"):
        train(other)


def test_a_loss_that_is_not_finite_names_the_samples(workspace, tmp_path, monkeypatch):
    original = Transformer.loss

    def broken(self, batch, total_weight=None):
        losses = original(self, batch, total_weight)
        return {**losses, "loss": losses["loss"] * math.nan}

    monkeypatch.setattr(Transformer, "loss", broken)
    with pytest.raises(TrainingError, match=r"at step 0: not finite.*samples: (s\d\d\d(, )?){8}$"):
        train(make_config(workspace, tmp_path / "run"))
    assert not (tmp_path / "run" / "generator").exists()


def test_codes_beyond_the_vocabulary(workspace, tmp_path):
    with pytest.raises(ConfigError, match=r"model.num_image_codes=8, but .* holds larger codes"):
        train(make_config(workspace, tmp_path / "run", model={"num_image_codes": 8}))


def test_another_image_tokenizer(workspace, tmp_path):
    torch.manual_seed(1)
    save_part(VQVAE(VQVAEConfig(channels=[4, 8], codebook_size=CODES)), tmp_path / "other")
    config = make_config(workspace, tmp_path / "run", data={"tokenizer": str(tmp_path / "other")})
    with pytest.raises(ConfigError, match="is not the tokenizer that made the codes"):
        train(config)


# two processes


def run_torchrun(config: GeneratorTrainConfig, path: Path, processes: int) -> subprocess.CompletedProcess[str]:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, "-m", "mmwudao", "train", "generator", str(path)],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], timeout=500,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_log_the_losses_of_one(workspace, tmp_path):
    settings = {"accumulate": 2, "ema": 0.9}
    done = run_torchrun(make_config(workspace, tmp_path / "two", **settings), tmp_path / "two.yaml", 2)
    assert done.returncode == 0, done.stderr
    train(make_config(workspace, tmp_path / "one", **settings))
    for name in ("train/loss", "train/image_bits", "train/gradient_norm", "test/test-family/image_bits"):
        one, two = logged(tmp_path / "one", name), logged(tmp_path / "two", name)
        assert len(one) == len(two) >= 2
        assert two == pytest.approx(one, rel=1e-5), name
    load_part(Transformer, tmp_path / "two" / "generator")
