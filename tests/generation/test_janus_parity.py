"""Janus as imported against transformers' `JanusForConditionalGeneration`: logits, guided codes, decoded pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from generation.drawing.decoding import generate_codes
from generation.drawing.engines import Engine
from generation.drawing.prompts import pad_prompts
from generation.drawing.sampling import SamplingOptions
from generation.janus.settings import JanusImport
from mmwudao.loading.importing import import_janus
from mmwudao.pipeline import Pipeline, load
from tests.helpers.janus import BEGIN, BOS, PROMPT, as_original, guided_codes, make_janus, save_janus

GREEDY = SamplingOptions(temperature=0, guidance=5.0)


@pytest.fixture(scope="module", params=[4, 2], ids=["heads", "shared-heads"])
def reference(request: pytest.FixtureRequest) -> Any:
    return make_janus(kv_heads=request.param)


@pytest.fixture(scope="module")
def pipeline(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("janus")
    source = save_janus(reference, folder / "published")
    return load(import_janus(source, folder / "model", JanusImport()), device="cpu", dtype="float32")


def row(pipeline: Pipeline, prompt: str = PROMPT) -> list[int]:
    return [BOS, *pipeline.text.encode(prompt), BEGIN]


@torch.no_grad()
def test_logits(reference: Any, pipeline: Pipeline) -> None:
    """After a prompt, and after codes behind it."""
    codes = torch.tensor([[3, 47, 0, 21]])
    embeds = [
        reference.get_input_embeddings()(torch.tensor([row(pipeline)])),
        reference.prepare_embeddings_for_image_generation(codes),
    ]
    hidden = reference.model.language_model(inputs_embeds=torch.cat(embeds, dim=1)).last_hidden_state
    expected = reference.model.generation_head(hidden[0, -5:])
    prompts = pad_prompts(pipeline.generator.config, [pipeline.text.encode(PROMPT)], pipeline.grid, tight=True)
    tokens = torch.cat([prompts.tokens, codes], dim=1)
    found = pipeline.generator.logits(
        pipeline.generator(tokens, prompts.positions[:, : tokens.shape[1]])[0, -5:], image_only=True
    )
    assert float(expected.std()) > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["modules", "auto"])
def test_greedy_guided_codes(reference: Any, pipeline: Pipeline, kind: Any) -> None:
    expected = guided_codes(reference, row(pipeline), guidance=5.0)
    found = generate_codes(
        pipeline.generator, [pipeline.text.encode(PROMPT)], [0], GREEDY, grid=pipeline.grid, engine=Engine(kind)
    )
    assert found.flatten().tolist() == expected
    assert len(set(expected)) > 3
    unguided = SamplingOptions(temperature=0, guidance=1.0)
    alone = generate_codes(pipeline.generator, [pipeline.text.encode(PROMPT)], [0], unguided, grid=pipeline.grid)
    assert alone.flatten().tolist() != expected


def test_the_unprompted_row_has_the_length_of_the_prompt(reference: Any, pipeline: Pipeline) -> None:
    """Several pictures of different prompts: each has its own row without the prompt."""
    prompts = ["a", PROMPT, "狗"]
    found = generate_codes(
        pipeline.generator, [pipeline.text.encode(prompt) for prompt in prompts], [0, 1, 2], GREEDY, grid=pipeline.grid,
        engine=Engine("modules", images=2),
    )  # fmt: skip
    for prompt, codes in zip(prompts, found, strict=True):
        assert codes.flatten().tolist() == guided_codes(reference, row(pipeline, prompt), guidance=5.0), prompt


def test_windows_draw_the_same(reference: Any, pipeline: Pipeline) -> None:
    expected = guided_codes(reference, row(pipeline), guidance=5.0)
    options = SamplingOptions(temperature=0, guidance=5.0, window=4)
    found = generate_codes(pipeline.generator, [pipeline.text.encode(PROMPT)], [0], options, grid=pipeline.grid)
    assert found.flatten().tolist() == expected


@torch.no_grad()
def test_decoded_pictures(reference: Any, pipeline: Pipeline) -> None:
    codes = torch.arange(32).view(2, 4, 4)
    expected = ((reference.decode_image_tokens(codes.flatten(1)) + 1) / 2).clamp(0, 1).permute(0, 3, 1, 2)
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(pipeline.tokenizer.decode(codes), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_codes_of_pictures_follow_the_original_rule(reference: Any, pipeline: Pipeline) -> None:
    """The nearest of normalised vectors; transformers leaves the normalisation of the picture's vectors out."""
    pictures = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    vq = reference.model.vqmodel
    vectors = F.normalize(vq.quant_conv(vq.encoder(2 * pictures - 1)), dim=1).permute(0, 2, 3, 1)
    codebook = F.normalize(vq.quantize.embedding.weight, dim=-1)
    expected = torch.cdist(vectors.flatten(0, 2), codebook).argmin(-1).view(3, 4, 4)
    assert torch.equal(pipeline.tokenizer.encode(pictures), expected)
    assert len(expected.unique()) > 3


def test_the_original_layout_is_the_same_model(reference: Any, pipeline: Pipeline, tmp_path: Path) -> None:
    source = as_original(save_janus(reference, tmp_path / "published"), tmp_path / "original")
    model = import_janus(source, tmp_path / "model", JanusImport())
    other = load(model, device="cpu", dtype="float32")
    assert other.config.model_hash == pipeline.config.model_hash
    assert other.generator.config == pipeline.generator.config
