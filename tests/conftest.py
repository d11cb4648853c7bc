"""What the tests share: a tiny model directory with random weights, and a trained (tiny) text tokenizer."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

CAPTIONS = [
    *("红心", "戴墨镜的笑脸", "一个红色的苹果", "月亮和星星", "睡觉的脸", "蓝色的鱼", "小猫", "大树"),
    *("red heart", "smiling face with sunglasses", "a red apple", "moon and stars", "sleeping face", "blue fish"),
    *("cœur rouge", "un visage qui sourit", "une pomme rouge", "la lune", "poisson bleu", "petit chat"),
    *("rotes Herz", "ein schlafendes Gesicht", "ein roter Apfel", "der Mond", "blauer Fisch", "kleine Katze"),
    *("červené srdce", "spící obličej", "červené jablko", "měsíc", "modrá ryba", "malá kočka"),
    *("赤いハート", "眠っている顔", "赤いりんご", "月と星", "青い魚", "子猫"),
    *("빨간 하트", "자는 얼굴", "빨간 사과", "달과 별", "파란 물고기", "고양이"),
    *("red heart, noto style", "红心, noto 风格", "rotes Herz, twemoji Stil", "赤いハート, noto スタイル"),
]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports travel between processes as UTF-8, which has no lone surrogates; some tests log them on purpose."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def make_model(folder: Path, *, seed: int = 0, name: str = "tiny") -> Path:
    """A whole model directory with random weights: 32 px pictures of 4 x 4 codes."""
    from data.text import TextTokenizer
    from generation.drawing.sampling import SamplingOptions
    from generation.transformer.config import TransformerConfig
    from generation.transformer.model import Transformer
    from mmwudao.loading.model_dir import assemble_model
    from vqvae.model import VQVAE, VQVAEConfig
    from vqvae.storage.parts import save_part

    torch.manual_seed(seed)
    parts = folder.parent / f"{folder.name}-parts"
    parts.mkdir(parents=True)
    text_model = parts / "text.model"
    TextTokenizer.train(CAPTIONS, text_model, vocab_size=400)
    text = TextTokenizer(text_model)
    vqvae = VQVAE(VQVAEConfig(channels=[8, 8, 16], residual_blocks=1, code_dim=8, codebook_size=32))
    tokenizer_hash = save_part(vqvae, parts / "tokenizer")
    config = TransformerConfig.modern(
        num_image_codes=32,
        num_text_pieces=text.vocab_size,
        width=32,
        depth=2,
        heads=2,
        max_text=24,
        grid=(4, 4),
        tokenizer_hash=tokenizer_hash,
        text_hash=text.content_hash,
    )
    save_part(Transformer(config), parts / "generator")
    return assemble_model(
        parts / "tokenizer",
        parts / "generator",
        text_model,
        folder,
        name=name,
        image_size=32,
        styles=["noto", "twemoji"],
        languages=["zh", "en", "fr", "de", "cs", "ja", "ko"],
        default_sampling=SamplingOptions(temperature=0.9, top_k=20, top_p=0.95, guidance=2.0),
        describes="tagged",
        answers=True,
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model directory with random weights. Tests must not change it: copy it first."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def filling_model_dir(tiny_model_dir: Path) -> Path:
    """The same model, which says that it was trained to fill holes."""
    folder = tiny_model_dir.parent / "filling"
    shutil.copytree(tiny_model_dir, folder)
    config = folder / "generator" / "config.json"
    stored = json.loads(config.read_text())
    assert stored["fills"] is False
    stored["fills"] = True
    config.write_text(json.dumps(stored))
    return folder


@pytest.fixture(scope="session")
def matching_model_dir(tiny_model_dir: Path) -> Path:
    """The same model with a random head for vectors of texts and pictures."""
    from dataclasses import replace

    from generation.transformer.match_head import MatchOptions
    from generation.transformer.model import Transformer
    from mmwudao.loading.model_dir import assemble_model, read_model_config
    from vqvae.storage.parts import load_part, save_part

    parts = tiny_model_dir.parent / "tiny-parts"
    plain, config = load_part(Transformer, parts / "generator"), read_model_config(tiny_model_dir)
    torch.manual_seed(2)
    headed = Transformer(replace(plain.config, match=MatchOptions(8)))
    headed.load_state_dict(headed.state_dict() | plain.state_dict())
    save_part(headed, parts / "matching")
    return assemble_model(
        parts / "tokenizer",
        parts / "matching",
        parts / "text.model",
        tiny_model_dir.parent / "matching",
        name="matching",
        image_size=config.image_size,
        styles=config.styles,
        languages=config.languages,
        default_sampling=config.default_sampling,
    )


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes with other weights: every hash but the text model's differs."""
    return make_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def loggers_as_they_were() -> Iterator[None]:
    """`mmwudao serve` quiets loggers for its process, which here is that of all tests."""
    from mmwudao.service.server import QUOTING_LOGGERS

    root = logging.getLogger()
    levels, handlers = {name: logging.getLogger(name).level for name in ("", *QUOTING_LOGGERS)}, list(root.handlers)
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    root.handlers[:] = handlers
