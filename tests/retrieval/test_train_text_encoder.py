"""Distilling a text encoder: the student comes nearer to its teacher, is stored in 4 bits, and resumes."""

import json

import pytest
import torch

from data.config import ConfigError
from retrieval.encoders.text_encoder import load_text_encoder, save_text_encoder
from retrieval.training.train_text_encoder import RoundedMatrix, TextEncoderTrainConfig, train
from tests.conftest import CAPTIONS
from tests.helpers.tiny_encoders import BERT, tiny_text_encoder, unigram_pieces
from vqvae.storage.blocks import pack_four_bit, unpack_four_bit
from vqvae.storage.parts import stored_hash
from vqvae.training.config import LoopConfig

WORDS = [f"{first} {second}" for first in CAPTIONS for second in ("red", "两个", "chat")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distil")
    save_text_encoder(tiny_text_encoder(), folder / "teacher")
    (folder / "texts.txt").write_text("\n".join([*CAPTIONS, *WORDS]), encoding="utf-8")
    return folder


LOOP = {"steps": 40, "learning_rate": 3e-3, "warmup": 5, "ema": 0.8, "log_every": 5, "eval_every": 4, "save_every": 20}


def config_of(workspace, out, bits=4, **loop):
    return TextEncoderTrainConfig(
        teacher=str(workspace / "teacher"), texts=[str(workspace / "texts.txt")], held_out=0.1,
        pieces=300, layers=[0, 2], max_tokens=40, bits=bits,
        loop=LoopConfig(
            out=str(out), batch_size=32, precision="float32", device="cpu",
            **{**LOOP, **loop},
        ),
    )  # fmt: skip


def test_a_student_comes_nearer_to_its_teacher(workspace, tmp_path):
    folder = train(config_of(workspace, tmp_path / "run"))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    cosines = [line["test/cosine"] for line in log if "test/cosine" in line]
    losses = [line["train/loss"] for line in log if "train/loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert cosines[-1] > cosines[0], cosines
    student = load_text_encoder(folder)
    assert student.config.bits == 4
    assert len(student.transformer.encoder.layer) == 2
    # what is stored is what it learned with: rounding it again changes no more than bfloat16 does (small matrices)
    for name, tensor in student.transformer.state_dict().items():
        if name.endswith("query.weight"):
            again = unpack_four_bit(pack_four_bit(tensor), tuple(tensor.shape))
            torch.testing.assert_close(again, tensor, rtol=2e-2, atol=1e-6)


def test_a_resumed_distillation_ends_where_a_whole_one_does(workspace, tmp_path):
    same = {"final_ratio": 1.0, "warmup": 0, "steps": 12, "eval_every": 100, "save_every": 6}
    whole = train(config_of(workspace, tmp_path / "whole", **same))
    train(config_of(workspace, tmp_path / "parts", **{**same, "steps": 6}))
    assert stored_hash(train(config_of(workspace, tmp_path / "parts", **same), resume=True)) == stored_hash(whole)


def test_a_student_goes_on_from_a_student(workspace, tmp_path):
    first = train(config_of(workspace, tmp_path / "first", steps=4))
    config = config_of(workspace, tmp_path / "second", steps=4, learning_rate=0.0)
    config.student = str(first)
    again = train(config)
    before, after = load_text_encoder(first), load_text_encoder(again)
    assert len(after.transformer.encoder.layer) == 2
    texts = CAPTIONS[:5]
    # nothing is learned at a rate of 0; what is stored is rounded once more, from bfloat16
    assert torch.nn.functional.cosine_similarity(before.encode(texts), after.encode(texts)).min() > 0.99
    wider = {**BERT, "hidden_size": 64, "vocab_size": len(unigram_pieces())}
    save_text_encoder(tiny_text_encoder(architecture=wider), tmp_path / "wider")
    config.student = str(tmp_path / "wider")
    with pytest.raises(ConfigError, match=r"vectors of 64 numbers, its teacher of 32; name a student of this teacher"):
        train(config)


def test_gradients_pass_straight_through():
    weight = torch.randn(8, 32, requires_grad=True)
    RoundedMatrix()(weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(8, 32))


def test_bad_settings_are_one_line(workspace, tmp_path):
    config = config_of(workspace, tmp_path / "run")
    with pytest.raises(ConfigError, match="bits"):
        config_of(workspace, tmp_path / "run", bits=5)
    config.texts = [str(tmp_path / "nosuch.txt")]
    with pytest.raises(ConfigError, match="nosuch"):
        train(config)
    (tmp_path / "empty.txt").write_text("\n\n")
    config.texts = [str(tmp_path / "empty.txt")]
    with pytest.raises(ConfigError, match="no file"):
        train(config)
