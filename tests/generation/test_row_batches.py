"""Coded pairs, and batches of rows of them."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy
import pytest
import torch

from data.codes import CodedSample
from data.config import ConfigError
from data.sample import DataError
from data.styles import STYLE_PHRASES
from data.text import TextTokenizer
from generation.training import batches as batches_module
from generation.training.batches import RowBatches, RowMaker, held_out_batches
from generation.training.pairs import CodedPairs, unigram_bits
from generation.training.train_generator import train
from generation.transformer.config import TransformerConfig
from tests.helpers.tiny_codes import CODES, coded, make_config, sample, write_codes, write_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return write_workspace(tmp_path_factory.mktemp("generator"))


def pairs_of(folder: Path, grids: list[list[list[int]]], **changes) -> CodedPairs:
    items = [CodedSample(sample(n, **changes), numpy.array(grid, numpy.uint16)) for n, grid in enumerate(grids)]
    return CodedPairs(write_codes(folder, {"train": items}), "train")


def test_unigram_bits_by_hand(tmp_path):
    train_pairs = pairs_of(tmp_path / "a", [[[0, 0], [0, 0]]])
    test_pairs = pairs_of(tmp_path / "b", [[[0, 1], [0, 1]]])
    # add-one counts 5, 1, 1, 1 of 8
    expected = (-math.log2(5 / 8) - math.log2(1 / 8)) / 2
    assert unigram_bits(train_pairs, test_pairs, 4) == pytest.approx(expected)
    assert train_pairs.histogram(4).tolist() == [4, 0, 0, 0]


def test_balance_weights(tmp_path):
    concepts = [("a", "noto")] * 4 + [("a", "openmoji"), ("b", "noto"), (None, "noto"), (None, "noto")]
    items = [
        CodedSample(sample(n, base_concept=concept, family=family), numpy.zeros((1, 1), numpy.uint16))
        for n, (concept, family) in enumerate(concepts)
    ]
    pairs = CodedPairs(write_codes(tmp_path / "codes", {"train": items}), "train")
    assert pairs.sampling_weights(0).tolist() == [1.0] * 8
    assert pairs.sampling_weights(1).tolist() == [0.25] * 4 + [1.0] * 4
    assert pairs.sampling_weights(0.5).tolist() == [0.5] * 4 + [1.0] * 4


def test_families_can_be_left_out(workspace):
    pairs = CodedPairs(workspace / "codes", "train", ["noto"])
    assert [item.id for item in pairs.samples] == [f"s{n:03d}" for n in range(0, 40, 2)]
    assert (len(pairs), pairs.grid) == (20, (4, 4))
    with pytest.raises(DataError, match="no pictures of the chosen families"):
        CodedPairs(workspace / "codes", "train", ["noto", "openmoji"])


def test_pictures_of_different_sizes(tmp_path):
    with pytest.raises(DataError, match="differ in size; tokenize them at one size"):
        pairs_of(tmp_path / "codes", [[[0]], [[0, 1]]])


# batches


def batches_of(workspace, tmp_path, mix=None, **loop) -> RowBatches:
    config = replace(make_config(workspace, tmp_path / "run", **loop), packing=False, mix=mix or {"draw": 1.0})
    text = TextTokenizer(workspace / "text.model")
    pairs = CodedPairs(workspace / "codes", "train")
    model = TransformerConfig(**{**asdict(config.model), "num_text_pieces": text.vocab_size, "grid": pairs.grid})
    return RowBatches(pairs, RowMaker(text, model, config))


def test_a_batch_depends_on_the_step_alone(workspace, tmp_path):
    first, second = batches_of(workspace, tmp_path), batches_of(workspace, tmp_path)
    list(first(0))
    ((batch, _), ids), ((again, _), ids_again) = next(first(3)), next(second(3))
    assert ids == ids_again
    assert torch.equal(batch.tokens, again.tokens)
    assert next(first(4))[1] != ids
    assert next(batches_of(workspace, tmp_path, seed=1)(3))[1] != ids


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_share_out_one_batch(workspace, tmp_path, monkeypatch, accumulate):
    (((whole, _), whole_ids),) = batches_of(workspace, tmp_path)(5)
    rows: dict[str, list[list[int]]] = {}
    ids = []
    monkeypatch.setattr(batches_module, "replicas", lambda: 2)
    for process in (0, 1):
        monkeypatch.setattr(batches_module, "replica", lambda process=process: process)
        parts = list(batches_of(workspace, tmp_path, accumulate=accumulate)(5))
        assert len(parts) == accumulate
        for (batch, _), part_ids in parts:
            assert len(part_ids) == len(batch.tokens) == 4 // accumulate
            ids += part_ids
            for row, mask in zip(batch.tokens, batch.weights > 0, strict=True):
                rows.setdefault("parts", []).append(row[mask].tolist())
    for row, mask in zip(whole.tokens, whole.weights > 0, strict=True):
        rows.setdefault("whole", []).append(row[mask].tolist())
    assert sorted(ids) == sorted(whole_ids)
    assert sorted(rows["parts"]) == sorted(rows["whole"])  # the captions too


def test_the_divisor_is_the_mean_weight_of_the_micro_batches(workspace, tmp_path):
    found = [entry[0] for entry in batches_of(workspace, tmp_path, accumulate=4)(0)]
    mean = sum(float(batch.weights.sum()) for batch, _ in found) / 4
    assert [float(total) for _, total in found] == pytest.approx([mean] * 4)
    assert len({float(batch.weights.sum()) for batch, _ in found}) > 1


def test_a_batch_that_does_not_divide(workspace, tmp_path):
    with pytest.raises(ConfigError, match=r"loop\.batch_size=8 is not a multiple of accumulate x processes = 3"):
        train(make_config(workspace, tmp_path / "run", accumulate=3))


def test_held_out_batches_are_fixed_and_spread_over_the_split(workspace, tmp_path):
    batches = batches_of(workspace, tmp_path)
    config = make_config(workspace, tmp_path / "run", data={"test_pictures": 4})
    maker = replace(batches.maker, config=config)
    found, again = (held_out_batches(batches.pairs, maker) for _ in range(2))
    assert [len(batch.tokens) for batch in found] == [4]
    assert torch.equal(found[0].tokens, again[0].tokens)
    first_codes = [row[mask][0] for row, mask in zip(found[0].targets, found[0].image_mask, strict=True)]
    assert first_codes == [batches.pairs.codes[index][0, 0] for index in (0, 10, 20, 30)]
    decode = TextTokenizer(workspace / "text.model").decode
    text_range = batches.maker.model.vocabulary.text_range
    offset = text_range.start
    for row, index in zip(found[0].tokens, (0, 10, 20, 30), strict=True):
        text = decode([int(t) - offset for t in row if int(t) in text_range])
        item = batches.pairs.samples[index]
        names = {STYLE_PHRASES[k].format(caption=c.name, family=item.family) for k, c in item.captions.items()}
        assert any(name.startswith(text) for name in names)  # cut to max_text pieces
    config.data.test_pictures = 1000
    found = held_out_batches(batches.pairs, maker)
    assert [len(batch.tokens) for batch in found] == [32, 8]


def test_rows_are_packed_where_attention_is_dense(workspace, tmp_path):
    batches = batches_of(workspace, tmp_path)
    (padded, total), ids = next(batches(2))
    batches.maker.config.packing = True
    (packed, total_again), ids_again = next(batches(2))
    assert (len(padded.tokens), len(packed.tokens), len(packed.lengths or ())) == (8, 1, 8)
    assert ids == ids_again
    assert torch.equal(total, total_again)
    batches.maker.model.sparse_window = 4
    (sparse, _), _ = next(batches(2))
    assert torch.equal(sparse.tokens, padded.tokens)


def test_whole_steps_describe_each_picture_in_every_language(workspace, tmp_path):
    batches = batches_of(workspace, tmp_path, mix={"draw": 0.75, "describe": 0.25}, batch_size=8)
    batches.maker.config.given_codes = 0.5
    vocab, given, describing = batches.maker.model.vocabulary, [], 0
    for step in range(80):
        (batch, total), _ = next(batches(step))
        if batch.segments is None:
            assert (batch.tokens[:, 0] == vocab.command("[ROI1]")).all()
            continue
        describing += 1
        codes = (batch.tokens < CODES).sum(dim=1)
        assert len(set(codes.tolist())) == 1
        given.append(int(codes[0]))
        languages = len(batches.pairs.samples[0].captions)
        assert ((batch.tokens == vocab.command("[ROI1]")).sum(dim=1) == languages).all()
        assert (batch.segments.amax(dim=1) == languages).all()
        assert float(total) == pytest.approx(float(batch.weights.sum()))
    assert 10 <= describing <= 32
    assert 8 <= min(given) <= max(given) - 4 <= 12


def test_pictures_without_captions_are_drawn_but_not_described(tmp_path, workspace, caplog):
    items = [coded(number) for number in range(8)]
    for item in items[:6]:
        item.sample.captions = {}
    pairs = CodedPairs(write_codes(tmp_path / "codes", {"train": items}), "train")
    config = make_config(workspace, tmp_path / "run")
    model = replace(config.model, num_text_pieces=320, grid=(4, 4))
    maker = RowMaker(TextTokenizer(workspace / "text.model"), model, config)
    for mix, expected in (({"draw": 1.0}, {f"s{n:03d}" for n in range(8)}), ({"describe": 1.0}, {"s006", "s007"})):
        batches = RowBatches(pairs, replace(maker, config=replace(config, mix=mix)))
        assert {one for step in range(20) for _, ids in batches(step) for one in ids} == expected
    assert caplog.messages == ["6 of 8 pictures have no caption and are not used to describe"]
    assert [len(batch.tokens) for batch in held_out_batches(pairs, maker)] == [8]
    assert [len(batch.tokens) for batch in held_out_batches(pairs, maker, "describe")] == [2]
    for item in items:
        item.sample.captions = {}
    pairs = CodedPairs(write_codes(tmp_path / "none", {"train": items}), "train")
    with pytest.raises(DataError, match=r"mix\.describe: no training picture has a caption"):
        RowBatches(pairs, replace(maker, config=replace(config, mix={"describe": 1.0})))


def test_code_noise_is_up_to_its_share_and_the_same_each_time(workspace, tmp_path):
    clean = batches_of(workspace, tmp_path, batch_size=32)
    noisy = batches_of(workspace, tmp_path, batch_size=32)
    noisy.maker.config.code_noise = 0.5
    (before, _), _ = next(clean(3))
    (after, _), _ = next(noisy(3))
    (again, _), _ = next(noisy(3))
    assert torch.equal(after.tokens, again.tokens)
    assert torch.equal(after.targets, before.targets)
    share = float((after.tokens != before.tokens).sum()) / (before.tokens < CODES).sum().item()
    assert 0.1 < share < 0.3  # 0.25 on average, and some of the other pictures' codes are the same


def test_codes_are_hidden_in_rows_that_draw_alone(workspace, tmp_path):
    batches = batches_of(workspace, tmp_path, batch_size=64)
    batches.maker.config.code_mask = 0.5
    mask = batches.maker.model.vocabulary.command("[MASK]")
    (batch, _), _ = next(batches(0))
    hidden = (batch.tokens == mask).sum(dim=1)
    assert 0.25 < float((hidden > 0).float().mean()) < 0.75
    assert float(hidden[hidden > 0].float().mean()) == pytest.approx(0.75 * 16, abs=2)
    assert (batch.targets != mask).all()
    batches = batches_of(workspace, tmp_path, mix={"describe": 1.0}, batch_size=64)
    batches.maker.config.code_mask = 0.5
    (batch, _), _ = next(batches(0))
    assert (batch.tokens != mask).all()


def test_batches_draw_among_the_views_of_a_picture(workspace, tmp_path):
    items = [coded(n) for n in range(12)]
    for item in items:
        item.views = numpy.stack([(item.codes + added) % CODES for added in (1, 2)])
    write_codes(tmp_path / "codes", {"train": items})
    pairs = CodedPairs(tmp_path / "codes", "train")
    assert pairs.views is not None
    assert pairs.views.shape == (12, 2, 4, 4)
    config = make_config(workspace, tmp_path / "run", batch_size=64)
    maker = RowMaker(TextTokenizer(workspace / "text.model"), replace(config.model, num_text_pieces=320), config)
    ((batch, _), ids) = next(RowBatches(pairs, maker)(0))
    firsts = batch.targets[batch.image_mask].view(len(ids), 16)[:, 0].tolist()
    added = [first - int(name[1:]) % 8 for first, name in zip(firsts, ids, strict=True)]
    assert {number: added.count(number) > 8 for number in (0, 1, 2)} == dict.fromkeys((0, 1, 2), True)
    assert set(added) == {0, 1, 2}
    # held-out pictures are themselves
    held_out = held_out_batches(pairs, maker)
    assert torch.equal(held_out[0].targets[held_out[0].image_mask].view(-1, 16), pairs.codes.flatten(1).long())
    items[3].views = None
    write_codes(tmp_path / "mixed", {"train": items})
    with pytest.raises(DataError, match="differ in the number of their other views"):
        CodedPairs(tmp_path / "mixed", "train")
