"""Emu3 as imported against transformers' `Emu3ForConditionalGeneration`: logits, guided codes, pictures both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from generation.drawing.decoding import count_steps, generate_codes
from generation.drawing.engines import Engine
from generation.drawing.noise import make_noise, place_noise
from generation.drawing.prompts import pad_prompts
from generation.drawing.row_ends import PictureRows
from generation.drawing.sampling import SamplingOptions
from generation.emu3.settings import Emu3Import
from mmwudao.loading.importing import import_emu3
from mmwudao.pipeline import Pipeline, load
from tests.helpers.emu3 import END, PROMPT, guided_codes, make_emu3, save_emu3

GREEDY = SamplingOptions(temperature=0, guidance=3.0)
UNWANTED = "bad, worse."


@pytest.fixture(scope="module", params=[False, True], ids=["in-order", "shuffled"])
def reference(request: pytest.FixtureRequest) -> Any:
    """With the ids of the codes in order behind the text's, as published, and among each other."""
    return make_emu3(shuffled=request.param)


@pytest.fixture(scope="module")
def pipeline(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("emu3")
    source = save_emu3(reference, folder / "published")
    settings = Emu3Import(image_size=8, unwanted=UNWANTED)
    return load(import_emu3(source, folder / "model", settings), device="cpu", dtype="float32")


def expected_codes(reference: Any, pipeline: Pipeline, prompt: str = PROMPT) -> list[int]:
    return guided_codes(reference, pipeline.text.encode(prompt), pipeline.generator.config.frame.stored, 3.0)


def test_the_row(pipeline: Pipeline) -> None:
    text: Any = pipeline.text
    assert (
        text.template
        == "<|extra_203|>{prompt} masterpiece, film grained, best quality.<|image start|>4*4<|image token|>"
    )
    stored = text.encode_in("<|extra_203|>{prompt}<|image start|>4*4<|image token|>", UNWANTED)
    assert pipeline.generator.config.frame.stored == stored
    assert pipeline.generator.config.row_end == END
    assert pipeline.generator.config.key_heads == 2


@torch.no_grad()
def test_logits(reference: Any, pipeline: Pipeline) -> None:
    """After a prompt, and after codes and the end of a row behind it."""
    config, mapping = pipeline.generator.config, reference.vocabulary_mapping.img2bpe
    codes = [3, 47, 0, 21]
    row = [*pipeline.text.encode(PROMPT), *(mapping[code] for code in codes), END, mapping[7]]
    ids = [mapping[code] for code in range(config.num_image_codes)]
    wanted = reference(torch.tensor([row])).logits[0, -7:, ids]
    prompts = pad_prompts(config, [pipeline.text.encode(PROMPT)], pipeline.grid, tight=True)
    tokens = torch.cat([prompts.tokens, torch.tensor([[*codes, *config.vocabulary.text([END]), 7]])], dim=1)
    hidden = pipeline.generator(tokens, prompts.positions[:, : tokens.shape[1]])
    found = pipeline.generator.logits(hidden[0, -7:], image_only=True)
    assert float(wanted.std()) > 0.5
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("window", "kind"), [(1, "fused"), (1, "modules"), (5, "auto")])
def test_greedy_guided_codes(reference: Any, pipeline: Pipeline, window: int, kind: Any) -> None:
    """Several prompts of other lengths than what is guided away from, alone and side by side."""
    prompts = ["a", PROMPT]
    wanted = [expected_codes(reference, pipeline, prompt) for prompt in prompts]
    assert len(set(wanted[1])) > 3
    assert wanted[0] != wanted[1]
    options = SamplingOptions(temperature=0, guidance=3.0, window=window)
    read = [pipeline.encode_prompt(prompt) for prompt in prompts]
    for images in (0, 2):
        steps: list[int] = []

        def note(step: int, codes: torch.Tensor, into: list[int] = steps) -> None:
            into.append(step)

        found = generate_codes(
            pipeline.generator, read, [0, 1], options, grid=pipeline.grid, engine=Engine(kind, images=images),
            on_token=note,
        )  # fmt: skip
        assert found.flatten(1).tolist() == wanted
        rows = images * 2 or pipeline.generator.config.block_rows
        assert steps[-1] == count_steps(2, options, pipeline.grid, rows=rows)
        assert steps == sorted(steps)
        assert window > 1 or len(steps) == steps[-1], "the end of a row is no step"


def test_given_rows_are_kept(reference: Any, pipeline: Pipeline) -> None:
    wanted = torch.tensor([expected_codes(reference, pipeline)]).view(1, 4, 4)
    for known in (1, 4, 6):
        given = torch.where(torch.arange(16).view(1, 4, 4) < known, wanted, -1)
        found = generate_codes(
            pipeline.generator, [pipeline.encode_prompt(PROMPT)], [0], GREEDY, grid=pipeline.grid, given_codes=given
        )
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_decoded_pictures(reference: Any, pipeline: Pipeline) -> None:
    """transformers decodes four frames and takes the first; here the others are left out. Also of other forms."""
    for codes in (torch.arange(32).view(2, 4, 4), torch.arange(6).view(1, 2, 3)):
        wanted = ((reference.model.vqmodel.decode(codes) + 1) / 2).clamp(0, 1)
        assert float(wanted.std()) > 0.1
        torch.testing.assert_close(pipeline.tokenizer.decode(codes), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_codes_of_pictures(reference: Any, pipeline: Pipeline) -> None:
    pictures = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    encoded = reference.model.vqmodel.encode(2 * pictures - 1, torch.tensor([[8, 8]] * 3))
    wanted = torch.stack(encoded.image_tokens)
    assert torch.equal(pipeline.tokenizer.encode(pictures), wanted)
    assert len(wanted.unique()) > 5


def test_the_keys_of_the_modules_are_the_same_model(reference: Any, pipeline: Pipeline, tmp_path: Path) -> None:
    """transformers stores its tensors under other names than its modules have; both are read."""
    from safetensors.torch import load_file, save_file

    source = save_emu3(reference, tmp_path / "published")
    stored = load_file(source / "model.safetensors").keys()
    tensors = {key: tensor.contiguous() for key, tensor in reference.state_dict().items()}
    assert not stored & tensors.keys()
    save_file(tensors, source / "model.safetensors")
    model = import_emu3(source, tmp_path / "model", Emu3Import(image_size=8, unwanted=UNWANTED))
    assert load(model, device="cpu").config.model_hash == pipeline.config.model_hash


# ends of rows and noise by themselves


def test_ends_of_rows() -> None:
    rows, plain = PictureRows((2, 3), 9), PictureRows((2, 3))
    codes = torch.arange(12).view(2, 6)
    places = rows.spread(codes)
    assert places.tolist() == [[0, 1, 2, 9, 3, 4, 5], [6, 7, 8, 9, 9, 10, 11]]
    assert torch.equal(rows.pictures(places), codes.view(2, 2, 3))
    assert [rows.is_end(place) for place in range(7)] == [False, False, False, True, False, False, False]
    assert [rows.codes_before(place) for place in range(8)] == [0, 1, 2, 3, 3, 4, 5, 6]
    assert rows.code_numbers(torch.arange(7)).tolist() == [0, 1, 2, 2, 3, 4, 5]
    assert plain.spread(codes) is codes
    assert plain.pictures(codes).data_ptr() == codes.data_ptr()
    assert not any(map(plain.is_end, range(6)))


def test_counter_noise_belongs_to_the_seed_and_the_place() -> None:
    noise = make_noise("counter", [3, 4, 3], 6, 1000, torch.device("cpu"))
    assert torch.equal(noise.at(5)[0], place_noise(3, 5, 1000))
    assert torch.equal(noise.at(5)[0], noise.at(5)[2])
    places = torch.tensor([[0, 5], [1, 2], [4, 4]])
    among = noise.among(places)
    assert among.shape == (3, 2, 1000)
    assert torch.equal(among[0, 1], noise.at(5)[0])
    assert torch.equal(among[1, 0], noise.at(1)[1])
    different = [place_noise(3, 5, 1000), place_noise(3, 6, 1000), place_noise(4, 5, 1000), place_noise(5, 3, 1000)]
    assert all(not torch.equal(one, other) for k, one in enumerate(different) for other in different[:k])


def test_counter_noise_is_gumbel_and_never_changes() -> None:
    drawn: Tensor = place_noise(2**62, 8099, 2**18)
    assert abs(float(drawn.mean()) - 0.5772) < 0.01
    assert abs(float(drawn.var()) - torch.pi**2 / 6) < 0.02
    # recipes of pictures that were drawn with it must go on to draw them
    torch.testing.assert_close(place_noise(7, 3, 4), torch.tensor(FIRST_OF_7_AT_3), rtol=0, atol=1e-6)


FIRST_OF_7_AT_3 = [0.3153351, 1.1307947, -1.0954956, -0.1411624]
