"""Knowledge inheritance for users' own towers: `train retrieval ... inherit.text=PART`."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from data.config import ConfigError
from retrieval.encoders.text_encoder import load_text_encoder, save_text_encoder
from retrieval.towers.base import load_towers
from retrieval.training.inherit import InitConfig
from retrieval.training.lessons import InheritConfig, lesson_loss
from retrieval.training.train_towers import train
from tests.helpers.tiny_encoders import tiny_text_encoder
from tests.retrieval.test_train_retrieval import COLOURS, logged, make_config, workspace  # noqa: F401  # a fixture


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_text_encoder(tiny_text_encoder(), tmp_path_factory.mktemp("teacher") / "text")


def test_the_loss_is_zero_for_the_teachers_own_similarities_and_positive_for_others():
    generator = torch.Generator().manual_seed(0)
    vectors, others = F.normalize(torch.randn(2, 6, 8, generator=generator), dim=-1)
    turned = vectors @ torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    assert lesson_loss(turned, vectors, 0.1).item() == pytest.approx(0, abs=1e-5)
    assert lesson_loss(others, vectors, 0.1).item() > 0.1
    by_hand = []
    for row in range(6):
        rest = torch.arange(6) != row
        own, wanted = (torch.softmax(part[row] @ part[rest].T / 0.5, dim=0) for part in (others, vectors))
        by_hand.append((wanted * (wanted / own).log()).sum())
    torch.testing.assert_close(lesson_loss(others, vectors, 0.5), torch.stack(by_hand).mean())


@pytest.mark.parametrize("name", ["clip", "moco"])
def test_towers_of_ones_own_learn_which_texts_are_alike(workspace, teacher, tmp_path, name):  # noqa: F811
    settings = {"objective": {"name": name, "queue": 24}, "loop": {"steps": 40, "learning_rate": 1e-2, "ema": 0.8}}
    lesson = InheritConfig(text=str(teacher), weight=5.0, batch=16)
    taught = load_towers(train(make_config(workspace, tmp_path / "taught", inherit=lesson, **settings)))
    plain = load_towers(train(make_config(workspace, tmp_path / "plain", **settings)))
    losses = logged(tmp_path / "taught", "train/lesson")
    assert losses[-1] < 0.7 * losses[0]
    assert not logged(tmp_path / "plain", "train/lesson")
    texts = [f"{colour} disc" for colour in COLOURS]
    vectors = load_text_encoder(teacher).encode(texts)
    wanted = F.normalize(vectors - vectors.mean(dim=0), dim=1)
    far = [lesson_loss(towers.encode_text(texts), wanted, 0.1).item() for towers in (taught, plain)]
    assert far[0] < 0.7 * far[1]


def test_streams_learn_from_files_of_texts(workspace, teacher, tmp_path):  # noqa: F811
    stream = {"in_memory": False, "shuffle": 8, "test_pictures": 5}
    with pytest.raises(ConfigError, match="inherit needs texts"):
        train(make_config(workspace, tmp_path / "none", data=dict(stream), inherit=InheritConfig(text=str(teacher))))
    (tmp_path / "texts.txt").write_text("\n".join(f"{colour} disc" for colour in COLOURS), encoding="utf-8")
    lesson = InheritConfig(text=str(teacher), texts=[str(tmp_path / "texts.txt")])
    train(make_config(workspace, tmp_path / "run", data=dict(stream), inherit=lesson))
    assert len(logged(tmp_path / "run", "train/lesson")) == 4


def test_inherit_is_not_for_towers_that_start_from_encoders(workspace, teacher, tmp_path):  # noqa: F811
    init = InitConfig(text=str(teacher), image=str(tmp_path))
    with pytest.raises(ConfigError, match=r"init\.text gives them one"):
        train(make_config(workspace, tmp_path / "run", init=init, inherit=InheritConfig(text=str(teacher))))
