"""CogView's sampler through our KV cache: the original's greedy (and seeded) tokens, windows and caption scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from generation.cogview.importing import import_generator
from generation.cogview.sampler import caption_scores, fill_sequence, forbidden_ids, magnify, step_probabilities
from generation.drawing.sampling import SamplingOptions
from generation.rows.vocabulary import Vocabulary
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from vqvae.storage.parts import load_part

SAMPLING = Path(__file__).parents[1] / "golden" / "cogview" / "sampling"
CASES = json.loads((SAMPLING / "cases.json").read_text())
LONG = [name for name in CASES if "1024" in name]
GREEDY = [name for name in CASES if CASES[name]["seed"] is None and name not in LONG]
SEEDED = [name for name in CASES if CASES[name]["seed"] is not None]
VOCAB = Vocabulary(64, 100)
GREEDILY = SamplingOptions(top_k=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    folder = tmp_path_factory.mktemp("cogview") / "part"
    import_generator(
        SAMPLING.parent / "transformer" / "ckpt", folder, num_image_codes=64, num_text_pieces=100,
        tokenizer_hash="t", text_hash="x", heads=4,
    )  # fmt: skip
    return load_part(Transformer, folder).float()


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(SAMPLING / "filling_sequence.safetensors")


def sampling_of(case: dict[str, Any]) -> SamplingOptions:
    return SamplingOptions(temperature=case["temperature"], top_k=case["top_k"], top_p=case["top_p"])


def filled(model: Transformer, golden: dict[str, torch.Tensor], name: str, steps: list | None = None) -> torch.Tensor:
    case = CASES[name]
    taken: list = [] if steps is None else steps
    return fill_sequence(
        model,
        golden[f"{name}.seq"],
        sampling_of(case),
        generator=torch.Generator().manual_seed(case["seed"] or 0),
        memory=case["max_memory_length"],
        on_step=lambda logits, probabilities: taken.append((logits, probabilities)),
    )


@pytest.mark.parametrize("name", [*GREEDY, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_greedy_tokens_are_the_originals(model, golden, name):
    steps: list[tuple[torch.Tensor, torch.Tensor]] = []
    assert torch.equal(filled(model, golden, name, steps), golden[f"{name}.tokens"])
    if f"{name}.step_logits" in golden:
        logits, probabilities = (torch.cat(part) for part in zip(*steps, strict=True))
        torch.testing.assert_close(logits, golden[f"{name}.step_logits"], rtol=0, atol=1e-4)
        torch.testing.assert_close(probabilities, golden[f"{name}.step_probs"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_tokens_are_the_originals(model, golden, name):
    """More than was asked for: the CPU's random stream may change with PyTorch, then only probabilities count."""
    steps: list[tuple[torch.Tensor, torch.Tensor]] = []
    tokens, expected = filled(model, golden, name, steps), golden[f"{name}.tokens"]
    assert tokens.shape == expected.shape
    if not torch.equal(tokens, expected):
        pytest.skip("this PyTorch draws other random numbers than the one of the golden files")
    if f"{name}.step_probs" in golden:
        probabilities = torch.cat([step[1] for step in steps])
        torch.testing.assert_close(probabilities, golden[f"{name}.step_probs"], rtol=0, atol=1e-5)


def test_rows_go_from_one_to_many_to_the_best_and_again(model, golden):
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    tokens = filled(model, golden, "beams_then_given", rows)
    assert [len(logits) for logits, _ in rows] == [1, 4, 4, 4, 4, 4] * 2
    assert len({tuple(row) for row in tokens[:, :15].tolist()}) == 1, "one row survived the given tokens"


def test_probabilities_of_the_goldens_steps(golden):
    """Teacher forcing: the original's logits give the original's probabilities, whatever is drawn."""
    name = "beams_then_given"
    options = sampling_of(CASES[name])
    row = golden[f"{name}.seq"].tolist()
    logits, expected = golden[f"{name}.step_logits"], golden[f"{name}.step_probs"]
    for start, given in ((0, row[:7]), (21, row[13:15])):
        found = step_probabilities(logits[start : start + 21], forbidden_ids(VOCAB, given), options)
        torch.testing.assert_close(found, expected[start : start + 21], rtol=0, atol=1e-6)


def test_the_filter_keeps_ties(golden):
    cases = load_file(SAMPLING / "logits_to_probs.safetensors")
    logits, nothing = cases["logits"], torch.zeros(256, dtype=torch.bool)
    images, text = torch.arange(256) >= 64, (torch.arange(256) < 64) | (torch.arange(256) >= 164)
    for name, forbidden, options in (
        ("topk10", nothing, SamplingOptions(top_k=10)),
        ("topk10_temp1p02", nothing, SamplingOptions(temperature=1.02, top_k=10)),
        ("image_only_topk200", images, SamplingOptions(top_k=200)),
        ("text_only_topk10", text, SamplingOptions(top_k=10)),
        ("topp0p8_row0", nothing, SamplingOptions(top_p=0.8)),
        ("topk30_topp0p8_row0", nothing, SamplingOptions(top_k=30, top_p=0.8)),
    ):
        found = step_probabilities(logits[:1] if "row0" in name else logits, forbidden, options)
        torch.testing.assert_close(found, cases[name], rtol=0, atol=1e-6)
    kept = (step_probabilities(logits, nothing, SamplingOptions(top_k=10)) > 0).sum(-1)
    assert kept.max() > 10, "one row has a tie at the tenth place"
    greedy = step_probabilities(logits, images, SamplingOptions(temperature=0))
    assert torch.equal(greedy.argmax(-1), logits[:, :64].argmax(-1))
    torch.testing.assert_close(greedy.amax(-1), torch.ones(3))


def test_what_may_follow_each_marker():
    allowed = {}
    for marker in ("[ROI1]", "[BOI1]", "[BOI2]", "[BOI3]", "[EOI1]", "[EOI2]", "[EOI3]"):
        ids = torch.arange(256)[~forbidden_ids(VOCAB, [VOCAB.command("[PAD]"), VOCAB.command(marker), 70])]
        assert len(ids) == ids[-1] - ids[0] + 1
        allowed[marker] = (int(ids[0]), int(ids[-1]))
    codes, pieces, all_but_codes = (0, 63), (64, 163), (64, 255)  # padding ids may be drawn
    assert allowed["[ROI1]"] == allowed["[BOI3]"] == allowed["[EOI3]"] == all_but_codes
    assert allowed["[BOI1]"] == allowed["[BOI2]"] == codes
    assert allowed["[EOI1]"] == allowed["[EOI2]"] == pieces


def test_caption_scores(model):
    golden = load_file(SAMPLING / "caption_score.safetensors")
    torch.testing.assert_close(caption_scores(model, golden["seq"]), golden["scores"], rtol=0, atol=1e-3)
    alone = torch.cat([caption_scores(model, row[None]) for row in golden["seq"]])
    torch.testing.assert_close(alone, golden["scores_one_by_one"], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_super_resolution(model):
    golden = load_file(SAMPLING / "magnify.safetensors")
    windows = []
    large = magnify(
        model,
        golden["text_part"],
        golden["codes_32x32"].view(32, 32),
        GREEDILY,
        on_window=lambda window, codes: windows.append((window, int((codes >= 0).sum()))),
    )
    assert torch.equal(large.view(1, -1), golden["magnified"])
    assert windows[0] == (0, 18 * 32)
    assert windows[-1] == (8, 4096)


def test_short_prompts_and_full_rows(model):
    """The original fails for a prompt of one token, and for a row without gaps."""
    assert fill_sequence(model, [VOCAB.command("[BOI1]"), -1, -1], GREEDILY).shape == (1, 3)
    assert fill_sequence(model, [1, 2, 3], GREEDILY).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "must start with a given token"),
        ([-1, 3], "must start with a given token"),
        ([300, -1], "holds the id 300"),
        ([1, -2, -3], "changes from 2 to 3"),
        ([1] * 1089 + [-1], "needs position 1089"),
    ],
)
def test_rows_that_cannot_be_filled(model, row, message):
    with pytest.raises(ValueError, match=message):
        fill_sequence(model, row, GREEDILY)


def test_arguments_that_do_not_fit(model):
    with pytest.raises(ValueError, match="no guidance"):
        fill_sequence(model, [1, -1], SamplingOptions(guidance=2.0))
    with pytest.raises(ValueError, match="memory"):
        fill_sequence(model, [1, -1], GREEDILY, memory=0)
    modern = Transformer(TransformerConfig.modern(num_image_codes=8, num_text_pieces=8, width=16, heads=2, depth=1))
    with pytest.raises(ValueError, match="1-D positions"):
        fill_sequence(modern, [1, -1], GREEDILY)
    with pytest.raises(ValueError, match="32x32 codes"):
        magnify(model, [1], torch.zeros(16, 16, dtype=torch.int64), GREEDILY)
    with pytest.raises(ValueError, match=r"one \[ROI1\]"):
        caption_scores(model, torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="no text after"):
        caption_scores(model, torch.tensor([[1, VOCAB.command("[ROI1]")]]))
