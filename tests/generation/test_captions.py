"""Pictures to text: rows with the image first, beam search, scores, and the pipeline's tasks on a tiny model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from data.images import to_square
from data.sample import Caption, Sample
from generation.captions import caption_log_probabilities, describe, describe_for_judge
from generation.cogview.sampler import caption_scores
from generation.rows.describe import caption_prompt_row, caption_row, caption_row_positions
from generation.rows.draw import row_positions
from generation.rows.row import collate
from generation.rows.texts import descriptions
from generation.rows.vocabulary import Vocabulary
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from mmwudao.canvas import SEAM, masked_canvas
from mmwudao.loading.model_dir import Part
from mmwudao.masks import check_completes, find_kept
from mmwudao.pipeline import load
from mmwudao.tasks import encode_pictures
from tests.helpers.tiny_towers import ColourTowers

VOCAB = Vocabulary(num_image_codes=64, num_text_pieces=100)
CODES = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_a_row_that_describes_is_spelled_image_first():
    row = caption_row(VOCAB, [[7, 8]], CODES, max_text=5)
    names = {name: VOCAB.command(name) for name in ("[TINY]", "[BOI1]", "[EOI1]", "[ROI1]", "[SEP]")}
    whole = [names["[TINY]"], names["[BOI1]"], 1, 2, 3, 4, 5, 6, names["[EOI1]"], names["[ROI1]"], 71, 72]
    assert row.tokens.tolist() == whole
    # the text alone is learned
    assert row.targets.tolist() == [*[VOCAB.command("[PAD]")] * 9, 71, 72, names["[SEP]"]]
    assert not row.image_mask.any()
    assert caption_prompt_row(VOCAB, CODES, [7, 8]) == whole


@pytest.mark.parametrize("preset", [TransformerConfig.cogview, TransformerConfig.modern])
def test_many_texts_behind_one_picture_are_as_many_rows(preset):
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 2, "heads": 2, "max_text": 4, "grid": (2, 3)}
    model = Transformer(preset(num_image_codes=64, num_text_pieces=100, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform
    vocab, kind = model.config.vocabulary, model.config.position_kind
    texts = [[7, 8], [9], [10, 11, 12, 13, 14], [15, 16, 17]]  # one of them longer than max_text
    given = torch.tensor([[True, False, True], [True, True, False]])
    for kept in (None, given):
        together = collate(vocab, [caption_row(vocab, texts, CODES, 4, kind, kept)] * 2)
        apart = [collate(vocab, [caption_row(vocab, [text], CODES, 4, kind, kept)]) for text in texts]
        with torch.no_grad():
            alone = [model._cross_entropy(model(b.tokens, b.positions), b, b.weights > 0, False)[0] for b in apart]
            hidden = model(together.tokens, together.positions, segments=together.segments)
            found, _ = model._cross_entropy(hidden, together, together.weights > 0, False)
        torch.testing.assert_close(found, torch.cat(alone).repeat(2), atol=1e-5, rtol=1e-5)
    row = caption_row(VOCAB, [[7]], CODES, 4, given=given)
    assert row.tokens[2:6].tolist() == [1, 3, 4, 5]
    whole = caption_row(VOCAB, [[7]], CODES, 4)
    assert torch.equal(row.positions[2:6], whole.positions[[2, 4, 5, 6]])  # each code stays where it was


def test_text_and_codes_stand_where_they_stand_in_a_row_that_draws():
    drawing = row_positions(2, (2, 3), 5, "grid")
    describing = caption_row_positions(2, (2, 3), 5, "grid")
    assert torch.equal(describing[2:8], drawing[5:11])  # codes
    assert torch.equal(describing[8], drawing[11])  # [EOI1]
    assert torch.equal(describing[9:12], drawing[:3])  # [ROI1] and the text
    # nothing before the text may tell how long it is
    assert torch.equal(describing[:10], caption_row_positions(4, (2, 3), 5, "grid")[:10])
    assert torch.equal(caption_row_positions(2, (2, 3), 5, "sequence"), torch.arange(13))


def test_no_position_is_outside_the_models_tables():
    for preset in (TransformerConfig.cogview, TransformerConfig.modern):
        config = preset(num_image_codes=64, num_text_pieces=100, width=16, depth=1, heads=2, max_text=5, grid=(2, 3))
        row = caption_row(config.vocabulary, [range(9)], CODES, config.max_text, config.position_kind)
        assert int(row.positions.max()) < config.num_positions
        Transformer(config).loss(collate(config.vocabulary, [row]))


def test_descriptions_name_their_language():
    sample = Sample("x", b"", "png", {"zh": Caption("红心", ()), "en": Caption("red heart", ())}, family="noto")
    assert descriptions(sample) == ["en: red heart", "zh: 红心"]  # and not the style


def small_model(**changes: object) -> Transformer:
    torch.manual_seed(3)
    settings = {"num_image_codes": 16, "num_text_pieces": 5, "width": 32, "depth": 2, "heads": 2, "max_text": 4}
    model = Transformer(TransformerConfig.modern(**settings, grid=(3, 3), **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform
    return model.eval()


@pytest.mark.parametrize("position", ["rotary_2d", "sequence"])
def test_beam_search_with_enough_beams_finds_the_best_of_all_texts(position):
    model = small_model(position=position)
    codes = torch.arange(9).view(3, 3)
    start, room = [2], 3
    texts = [[*start, *rest] for length in range(1, room + 1) for rest in itertools.product(range(5), repeat=length)]
    vocab = model.config.vocabulary
    allowed = torch.full((vocab.padded_size,), -torch.inf)
    allowed[[*vocab.text_range, vocab.command("[SEP]")]] = 0
    expected = {}
    for text in texts:
        row = caption_row(vocab, [text], codes, 4, model.config.position_kind)
        with torch.no_grad():
            hidden = model(row.tokens[None], row.positions[None])[0]
            places = slice(len(row.tokens) - len(text) + len(start) - 1, None)
            logits = (model.logits(hidden[places]) + allowed).log_softmax(-1)
        expected[tuple(text[1:])] = float(logits.gather(1, row.targets[places, None]).sum())
    found = describe(model, codes, start, beams=200)
    assert found[0].pieces == max(expected, key=lambda pieces: expected[pieces] / (len(pieces) + 1))
    assert len(found) == len(expected)
    for one in found:
        assert one.log_probability == pytest.approx(expected[one.pieces], abs=1e-4)
    few = describe(model, codes, start, beams=2)
    assert few[0].score <= found[0].score + 1e-5


def test_a_judge_adds_to_the_log_probability():
    model, codes, start = small_model(), torch.arange(9).view(3, 3), [2]
    everything: dict[str, Any] = {"beams": 200, "judged": 1000, "nucleus": 1.0}
    alone = {one.pieces: one.log_probability for one in describe(model, codes, start, beams=200)}
    indifferent = describe_for_judge(model, codes, lambda texts: torch.zeros(len(texts)), start, **everything)
    assert indifferent[0][0].pieces == max(alone, key=alone.__getitem__)

    def judge(texts):
        return torch.tensor([3.0 * text.count(4) for text in texts])

    found = describe_for_judge(model, codes, judge, start, **everything)
    best = max(alone, key=lambda pieces: alone[pieces] + 3.0 * pieces.count(4))
    assert best != indifferent[0][0].pieces
    assert found[0][0].pieces == best
    assert found[0][1] == pytest.approx(alone[best] + 3.0 * best.count(4), abs=1e-4)
    # a judge that wants what the model would never say is not followed
    narrow = describe_for_judge(model, codes, lambda texts: 100 * judge(texts), start, beams=4, judged=8, nucleus=0.01)
    likeliest = describe(model, codes, start, beams=1)
    assert narrow[0][0].pieces in {one.pieces[:k] for one in likeliest for k in range(1, 4)}
    with pytest.raises(ValueError, match="at least 1"):
        describe_for_judge(model, codes, judge, start, beams=0)


def test_without_an_end_mark_every_text_has_the_same_length():
    found = describe(small_model(), torch.arange(9).view(3, 3), beams=3, max_pieces=2, ends=False)
    assert [len(one.pieces) for one in found] == [2, 2, 2]


def test_what_cannot_be_described_is_refused():
    model = small_model()
    with pytest.raises(ValueError, match="at least 1"):
        describe(model, torch.zeros(3, 3, dtype=torch.int64), beams=0)
    with pytest.raises(ValueError, match="at least 1"):
        describe(model, torch.zeros(3, 3, dtype=torch.int64), [0, 1, 2, 3])
    with pytest.raises(ValueError, match="up to 3x3"):
        describe(model, torch.zeros(4, 3, dtype=torch.int64))


def test_scores_do_not_depend_on_the_batch_and_agree_with_cogviews():
    model = small_model(position="sequence")
    codes = torch.randint(16, (3, 3, 3))
    together = caption_log_probabilities(model, codes, [1, 2, 3])
    apart = torch.cat([caption_log_probabilities(model, one[None], [1, 2, 3]) for one in codes])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    # CogView's score lacks the end mark: the end's own share is what is left
    rows = torch.tensor([caption_prompt_row(model.config.vocabulary, one, [1, 2, 3]) for one in codes])
    end = together - caption_log_probabilities(model, codes, [1, 2, 3], start=3)
    torch.testing.assert_close(caption_scores(model, rows), end, atol=1e-4, rtol=0)


def kept_cells(keep, grid) -> torch.Tensor:
    return find_kept(keep, grid, 64).cells


@pytest.mark.parametrize("keep", ["top:0.5", "left:0.25"])
def test_what_stays(keep):
    cells = kept_cells(keep, (4, 8))
    expected = torch.zeros(4, 8, dtype=torch.bool)
    if keep.startswith("top"):
        expected[:2] = True
    else:
        expected[:, :2] = True
    assert torch.equal(cells, expected)


def test_masks_are_starts_in_raster_order_or_left_parts(tmp_path):
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 64, 30))  # 3 whole rows of 8 pixels
    mask.save(tmp_path / "mask.png")
    for keep in (mask, str(tmp_path / "mask.png")):
        assert kept_cells(keep, (8, 8)).sum(dim=1).tolist() == [8, 8, 8, 0, 0, 0, 0, 0]
    left = Image.new("L", (32, 32), 0)
    left.paste(255, (0, 0, 16, 32))
    assert kept_cells(left, (4, 4)).tolist() == [[True, True, False, False]] * 4


@pytest.mark.parametrize("box", [(0, 32, 64, 64), (32, 0, 64, 64), (16, 16, 48, 48)])
def test_other_masks_are_refused(box):
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, box)
    with pytest.raises(ValueError, match="top or its left part"):
        check_completes(kept_cells(mask, (8, 8)))


@pytest.mark.parametrize("keep", ["top:0", "top:1", "left:-1", "top:nan", "bottom:0.5", "no-such-file.png", "top:x"])
def test_what_cannot_stay_is_refused_in_one_line(keep):
    with pytest.raises(ValueError, match="keep") as error:
        kept_cells(keep, (8, 8))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("colour", [0, 255])
def test_a_mask_of_one_colour_is_refused(colour):
    with pytest.raises(ValueError, match="something to"):
        kept_cells(Image.new("L", (8, 8), colour), (8, 8))


@pytest.fixture(scope="module")
def pipeline(tiny_model_dir):
    return load(tiny_model_dir, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def pictures():
    return [Image.new("RGB", (48, 40), colour) for colour in ("red", "navy", "white")]


@pytest.fixture(scope="module")
def judged(pipeline):
    """A pipeline with towers that know colours."""
    pipe = load(pipeline.source, device="cpu", dtype="float32")
    pipe.config = replace(pipe.config, parts={**pipe.config.parts, "towers": Part("towers", "")})
    pipe.towers = ColourTowers()
    return pipe


def test_captions_in_every_language(pipeline, pictures):
    for language in (None, *pipeline.config.languages):
        captions = pipeline.caption(pictures, language)
        assert len(captions) == 3
        assert all(isinstance(one, str) for one in captions)
    with pytest.raises(ValueError, match="unknown language 'tlh'"):
        pipeline.caption(pictures, "tlh")
    with pytest.raises(ValueError, match="no picture"):
        pipeline.caption([])


def test_towers_judge_captions(judged, pictures):
    assert judged.caption(pictures, "zh") == judged.caption(pictures, "zh", by="both")
    # colours are all that these towers know, and the pieces that name one are in the model's nucleus
    odds = [judged.towers.encode_text([text]) @ judged.towers.encode_image([picture])[0]
            for picture in pictures for text in judged.caption([picture], "en")]  # fmt: skip
    alone = [judged.towers.encode_text([text]) @ judged.towers.encode_image([picture])[0]
             for picture in pictures for text in judged.caption([picture], "en", by="generator")]  # fmt: skip
    assert sum(odds) >= sum(alone)
    with pytest.raises(ValueError, match="unknown writer"):
        judged.caption(pictures, by="me")


def test_only_a_model_with_towers_is_judged_by_them(pipeline, pictures):
    assert pipeline.caption(pictures) == pipeline.caption(pictures, by="generator")
    with pytest.raises(ValueError, match="no towers"):
        pipeline.caption(pictures, by="both")


def test_candidates_are_the_best_of_what_would_be_drawn(pipeline):
    drawn = pipeline.generate(["红心", "a red apple"], n=5, seed=3)
    kept = pipeline.generate(["红心", "a red apple"], n=2, seed=3, candidates=5)
    assert [one.info["prompt"] for one in kept] == ["红心", "红心", "a red apple", "a red apple"]
    by_seed = {one.info["seed"]: one for one in drawn}
    for first, second in (kept[:2], kept[2:]):
        assert first.info["score"] >= second.info["score"]
    for one in kept:
        assert one.tobytes() == by_seed[one.info["seed"]].tobytes()
        again = {key: value for key, value in one.info.items() if key != "score"}
        assert pipeline.redraw(again).tobytes() == one.tobytes()
    with pytest.raises(ValueError, match="candidates 1"):
        pipeline.generate("红心", n=2, candidates=1)


def test_a_kept_picture_scores_as_rerank_would_score_its_codes(pipeline, pictures):
    scores = pipeline.rerank("红心", pictures)
    codes = encode_pictures(pipeline, pictures)
    text = pipeline.text.encode("zh: 红心")
    start = len(pipeline.text.encode("zh:"))
    assert text[:start] == pipeline.text.encode("zh:")
    torch.testing.assert_close(
        torch.tensor(scores), caption_log_probabilities(pipeline.generator, codes, text, start), atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match="empty prompt"):
        pipeline.rerank(" ", pictures)


def test_towers_judge_pictures(judged, pictures):
    scores = judged.rerank("something blue", [*pictures, Image.new("RGB", (40, 40), "blue")], by="towers")
    assert max(range(4), key=scores.__getitem__) == 3
    assert scores[3] == pytest.approx(1, abs=1e-4)
    drawn = judged.generate("a blue fish", n=3, seed=3, candidates=6, rerank="towers")
    apart = judged.rerank("a blue fish", judged.generate("a blue fish", n=6, seed=3), by="towers")
    assert [one.info["score"] for one in drawn] == pytest.approx(sorted(apart, reverse=True)[:3], abs=1e-5)


def test_both_judges_weigh_alike(judged, pictures):
    caption, towers, both = (
        torch.tensor(judged.rerank("something red", pictures, by)) for by in ("caption", "towers", "both")
    )
    expected = sum((one - one.mean()) / one.std(correction=0) for one in (caption, towers)) / 2
    torch.testing.assert_close(both, expected, atol=1e-4, rtol=0)


def test_a_judge_that_is_not_there(pipeline, judged, pictures):
    with pytest.raises(ValueError, match="has no towers"):
        pipeline.generate("红心", candidates=2, rerank="both")
    with pytest.raises(ValueError, match="unknown judge 'me'"):
        judged.rerank("红心", pictures, by="me")


def test_what_is_kept_is_kept(pipeline, pictures):
    codes = encode_pictures(pipeline, pictures[:1])[0]
    canvas = masked_canvas(pipeline.canvas_format, pictures[0], "left:0.5")
    drawn = pipeline._draw_codes(pipeline.plan("红心", n=2, seed=1), None, canvas)
    assert torch.equal(drawn[:, :, :2], codes[None, :, :2].expand(2, -1, -1))
    completed = pipeline.complete(pictures[0], "红心", "left:0.5", n=2, seed=1)
    side = pipeline.config.image_size // 2
    square = to_square(pictures[0], 2 * side)
    for one, codes in zip(completed, drawn, strict=True):
        new = (side, 0, 2 * side, 2 * side)
        assert one.crop(new).tobytes() == pipeline.decode_codes(codes).crop(new).tobytes()
        own = (0, 0, side - SEAM, 2 * side)
        assert one.crop(own).tobytes() == square.crop(own).tobytes()
    assert completed[0].info["kept"] == "left:0.5"


def test_a_model_that_only_draws_says_so(tiny_model_dir, pictures):
    pipe = load(tiny_model_dir, device="cpu", dtype="float32")
    pipe.config = replace(pipe.config, describes="no")
    for call in (
        lambda: pipe.caption(pictures),
        lambda: pipe.rerank("红心", pictures),
        lambda: pipe.generate("红心", candidates=3),
    ):
        with pytest.raises(ValueError, match="not trained to describe"):
            call()
