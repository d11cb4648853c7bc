"""LlamaGen as imported against its own code, by golden files: logits, guided codes, pictures, cleaned captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.web_captions import clean_web_caption
from generation.drawing.decoding import generate_codes
from generation.drawing.engines import Engine
from generation.drawing.prompts import pad_prompts
from generation.drawing.sampling import SamplingOptions
from generation.llamagen.settings import LlamaGenImport
from mmwudao.loading.importing import import_llamagen
from mmwudao.pipeline import Pipeline, load
from tests.helpers.llamagen import CAPTION_SLOTS, GOLDEN, PROMPTS, golden, write_checkpoints, write_t5

SETTINGS = LlamaGenImport(image_size=8, heads=4, layers=2)
ASKED: dict[str, tuple[Sequence[str], float]] = {"c2i": (["3", "7", "0"], 4.0), "t2i": ([*PROMPTS], 7.5)}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return golden()


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    folder = tmp_path_factory.mktemp("llamagen")
    files = write_checkpoints(folder / "published")
    models = {
        kind: import_llamagen(
            files[kind], files["vq"], folder / kind, SETTINGS, vectors=files["vectors"] if kind == "t2i" else None
        )
        for kind in ASKED
    }
    return {kind: load(model, device="cpu", dtype="float32") for kind, model in models.items()}


@pytest.mark.parametrize("kind", ASKED)
def test_logits(pipelines: dict[str, Pipeline], expected: dict[str, Tensor], kind: str) -> None:
    """After each place of the picture, with the prompt and without."""
    pipeline, (prompts, _) = pipelines[kind], ASKED[kind]
    config = pipeline.generator.config
    for number, prompt in enumerate(prompts):
        read = pipeline.encode_prompt(prompt)
        padded = pad_prompts(config, [read, config.frame.unprompted(read)], pipeline.grid, tight=True)
        codes = expected[f"{kind}.guided"][number].expand(2, -1)
        tokens = torch.cat([padded.tokens, codes[:, :-1]], dim=1)
        with torch.no_grad():
            hidden = pipeline.generator(tokens, padded.positions[:, : tokens.shape[1]], features=padded.vectors)
            found = pipeline.generator.logits(hidden[:, padded.slots - 1 :], image_only=True)
        wanted = expected[f"{kind}.logits"][[number, number + len(prompts)]]
        assert float(wanted.std()) > 0.5
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("engine", ["modules", "fused"])
@pytest.mark.parametrize("kind", ASKED)
def test_greedy_codes(
    pipelines: dict[str, Pipeline], expected: dict[str, Tensor], kind: str, engine: Any, images: int
) -> None:
    """All of them, with guidance and without, code by code and in windows, alone and side by side."""
    pipeline, (prompts, guidance) = pipelines[kind], ASKED[kind]
    read = [pipeline.encode_prompt(prompt) for prompt in prompts]
    for name, scale in (("guided", guidance), ("plain", 1.0)):
        for window in (1, 5):
            options = SamplingOptions(temperature=0, guidance=scale, window=window)
            found = generate_codes(
                pipeline.generator, read, [0, 1, 2], options, grid=pipeline.grid, engine=Engine(engine, images=images)
            )
            assert torch.equal(found.flatten(1), expected[f"{kind}.{name}"]), (name, window)


def test_given_codes_are_read_behind_the_vectors(pipelines: dict[str, Pipeline], expected: dict[str, Tensor]) -> None:
    pipeline, (prompts, guidance) = pipelines["t2i"], ASKED["t2i"]
    wanted = expected["t2i.guided"].view(-1, *pipeline.grid)
    given = wanted.clone()
    given[:, 2:] = -1
    for window in (1, 3):
        options = SamplingOptions(temperature=0, guidance=guidance, window=window)
        read = [pipeline.encode_prompt(prompt) for prompt in prompts]
        found = generate_codes(
            pipeline.generator, read, [0, 1, 2], options, grid=pipeline.grid, given_codes=given
        )  # fmt: skip
        assert torch.equal(found, wanted)


def test_the_picture_tokenizer(pipelines: dict[str, Pipeline], expected: dict[str, Tensor]) -> None:
    tokenizer = pipelines["c2i"].tokenizer
    assert float(expected["vq.decoded"].std()) > 0.1
    torch.testing.assert_close(
        tokenizer.decode(torch.arange(32).view(2, 4, 4)), expected["vq.decoded"], rtol=0, atol=1e-5
    )
    assert torch.equal(tokenizer.encode(expected["vq.images"]), expected["vq.codes"])
    assert len(expected["vq.codes"].unique()) > 8


def test_captions_are_cleaned_as_the_original_does() -> None:
    for caption, cleaned in json.loads((GOLDEN.parent / "captions.json").read_text(encoding="utf-8")).items():
        assert clean_web_caption(caption) == cleaned


def test_the_text_encoder_is_that_of_transformers(tmp_path: Path) -> None:
    """The vectors of a prompt, in bfloat16 as LlamaGen's script computes them: the same numbers."""
    files, encoder = write_checkpoints(tmp_path / "published"), write_t5(tmp_path / "t5")
    model = import_llamagen(files["t2i"], files["vq"], tmp_path / "model", SETTINGS, t5=tmp_path / "t5")
    pipeline = load(model, device="cpu", dtype="float32")
    prompt = pipeline.encode_prompt("A Red — fox!")
    ids = [*pipeline.text.encode("a red - fox!")]
    assert pipeline.text.decode(ids) == "a red - fox!"
    with torch.no_grad():
        wanted = encoder.bfloat16().encoder(torch.tensor([ids])).last_hidden_state[0].float()
    assert prompt.features is not None
    assert torch.equal(prompt.features, wanted)
    assert list(prompt) == [*range(CAPTION_SLOTS - len(ids), CAPTION_SLOTS)]
    assert ids[-1] == 256, "the mark that ends a text"
    with pytest.raises(ValueError, match="nothing of the prompt is left"):
        pipeline.encode_prompt("狗")
    with pytest.raises(ValueError, match="this model reads 120: shorten it"):
        pipeline.encode_prompt("word " * 30)
