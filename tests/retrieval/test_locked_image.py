"""Locked-image tuning: texts learn to find pictures, whose vectors stay as they are."""

import json

import pytest
import torch
from torch.nn import functional as F

from data.config import ConfigError
from retrieval.encoders.text_encoder import save_text_encoder
from retrieval.towers.base import load_towers, save_towers
from retrieval.towers.pretrained import HeadsConfig, PretrainedTowers
from retrieval.training.locked_image import LockedImageConfig, PictureBank
from retrieval.training.pairs import PairsConfig
from retrieval.training.train_text_encoder import Distillation, TextEncoderTrainConfig, train
from tests.conftest import CAPTIONS
from tests.helpers.squares import write_squares
from tests.helpers.tiny_encoders import BERT, tiny_text_encoder, tiny_trunk, unigram_pieces
from tests.helpers.tiny_towers import tiny_towers
from vqvae.storage.parts import stored_hash
from vqvae.training.config import LoopConfig

HEADS = HeadsConfig(embed_dim=16, image_size=32, hidden=32, dropout=0.0)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("locked")
    write_squares(folder / "shards")
    save_text_encoder(tiny_text_encoder(), folder / "teacher")
    torch.manual_seed(0)
    towers = PretrainedTowers.from_parts(tiny_text_encoder(seed=1), tiny_trunk(), HEADS).eval()
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])[:, :, None, None].expand(4, 3, 32, 32)
    with torch.no_grad():  # a trunk at random makes nearly one vector of all colours
        towers.image_head.standardise_by(towers.trunk.forward_map(towers.normalise(colours)).mean(dim=(2, 3)))
    save_towers(towers, folder / "towers")
    (folder / "texts.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    return folder


def config_of(workspace, out, locked=None, **loop):
    changes = {"steps": 60, "learning_rate": 3e-3, "warmup": 5, "ema": 0.8, "eval_every": 30, "save_every": 30, **loop}
    return TextEncoderTrainConfig(
        teacher=str(workspace / "teacher"), texts=[str(workspace / "texts.txt")], held_out=0.1, bits=4,
        locked_image=LockedImageConfig(**{
            "towers": str(workspace / "towers"), "data": PairsConfig(str(workspace / "shards"), test=["test"]),
            "batch": 12, "candidates": 8, "weight": 1.0, **(locked or {}),
        }),
        loop=LoopConfig(out=str(out), batch_size=16, precision="float32", device="cpu", log_every=10, **changes),
    )  # fmt: skip


def test_texts_learn_to_find_pictures_that_stay(workspace, tmp_path):
    folder = train(config_of(workspace, tmp_path / "run"))
    assert folder.name == "towers"
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    contrast = [line["train/contrast"] for line in log if "train/contrast" in line]
    assert contrast[-1] < 0.9 * contrast[0], contrast
    assert any("test/test/text_recall@10/zh" in line for line in log)
    before, after = load_towers(workspace / "towers"), load_towers(folder)
    assert isinstance(after, PretrainedTowers)
    assert after.config.text.bits == 4
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # the new towers are stored in blocks of 8 bits, the old ones were not
    assert F.cosine_similarity(before.encode_image(pixels), after.encode_image(pixels)).min() > 0.999
    assert F.cosine_similarity(before.encode_text(CAPTIONS[:6]), after.encode_text(CAPTIONS[:6])).max() < 0.999


def test_a_resumed_run_ends_where_a_whole_one_does(workspace, tmp_path):
    same = {"final_ratio": 1.0, "warmup": 0, "save_every": 4, "eval_every": 100}
    whole = train(config_of(workspace, tmp_path / "whole", steps=8, **same))
    train(config_of(workspace, tmp_path / "parts", steps=4, **same))
    assert stored_hash(train(config_of(workspace, tmp_path / "parts", steps=8, **same), resume=True)) == stored_hash(
        whole
    )


def test_vectors_of_pictures_are_computed_once(workspace, tmp_path, monkeypatch):
    config = config_of(workspace, tmp_path / "run", {"views": 3}).locked_image
    bank = PictureBank(config, tmp_path / "pictures.safetensors")
    assert bank.vectors.shape == (3, 16, 16)
    assert not torch.equal(bank.vectors[0], bank.vectors[1])
    assert not torch.equal(bank.vectors[1], bank.vectors[2])
    with monkeypatch.context() as patched:
        patched.setattr(PictureBank, "measure", None)
        patched.setattr(
            "retrieval.training.locked_image.augment", lambda *_: pytest.fail("augmented, so computed again")
        )
        again = PictureBank(config, tmp_path / "pictures.safetensors")
    assert torch.equal(again.vectors, bank.vectors)


def test_a_caption_has_its_own_picture_and_the_seed_decides(workspace, tmp_path):
    bank = PictureBank(config_of(workspace, tmp_path / "run").locked_image, tmp_path / "pictures.safetensors")
    student = tiny_text_encoder()
    first, again, other = (bank.draw(student, seed) for seed in ("a", "a", "b"))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first.images, other.images)
    assert len(first.tokens) == 12
    assert len(first.other_images) == 8
    for image, label in zip(first.images, first.labels, strict=True):
        rows = (bank.vectors.float() == image).all(dim=2).nonzero()[:, 1]
        assert label in bank.labels[rows]


def test_parts_of_like_length_are_those_of_one_batch(monkeypatch):
    student = tiny_text_encoder()
    distillation = Distillation(student, torch.randn(10, student.width))
    tokens = student.tokenize([" ".join(CAPTIONS[: 1 + index % 5]) for index in range(17)])
    whole = F.normalize(student(tokens).float(), dim=1)
    monkeypatch.setattr("retrieval.training.train_text_encoder.LIKE_LENGTH", 4)
    torch.testing.assert_close(distillation.encode(tokens), whole, atol=1e-5, rtol=1e-4)


def test_towers_that_cannot_be_tuned_are_refused(workspace, tmp_path):
    other = save_towers(tiny_towers(), tmp_path / "other")
    for locked, message in (
        ({"towers": str(other)}, "only towers that train retrieval made with init"),
        ({"batch": 400}, "batch=400 exceeds the 16 pictures"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(config_of(workspace, tmp_path / "run", locked))
    config = config_of(workspace, tmp_path / "run")
    wider = {**BERT, "hidden_size": 64, "vocab_size": len(unigram_pieces())}
    save_text_encoder(tiny_text_encoder(architecture=wider), tmp_path / "wider")
    config.teacher = str(tmp_path / "wider")
    with pytest.raises(ConfigError, match="encoder of the towers has vectors of 32 numbers, its teacher of 64"):
        train(config)
