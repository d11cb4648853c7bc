import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy
import pytest
import torch
import yaml

from data.codes import CodedSample
from data.config import ConfigError, load_config
from data.sample import Caption, DataError, Sample
from data.shards import Manifest, ShardWriter, write_manifest
from data.styles import LANGUAGES, STYLE_PHRASES
from data.text import TextTokenizer
from generation.captions import caption_log_probabilities
from generation.rows.draw import training_row
from generation.rows.row import collate
from generation.rows.texts import CaptionMix, draw_caption
from generation.training import batches as batches_module
from generation.training.batches import RowBatches, RowMaker, held_out_batches
from generation.training.config import GeneratorDataConfig, GeneratorTrainConfig
from generation.training.pairs import CodedPairs, unigram_bits
from generation.training.train_generator import train
from generation.transformer.model import Transformer, TransformerConfig
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.storage.parts import load_part, save_part
from vqvae.training.loop import LoopConfig, TrainingError

CODES = 16
COLOURS = {"zh": "红", "en": "red", "fr": "rouge", "de": "rot", "cs": "červená", "ja": "赤", "ko": "빨강"}


def sample(number: int, **changes) -> Sample:
    captions = {language: Caption(f"{word} {number % 8}", (word, "x", "y")) for language, word in COLOURS.items()}
    fields = {"family": "noto" if number % 2 else "openmoji", "base_concept": f"c{number % 8}", **changes}
    return Sample(f"s{number:03d}", b"", "png", captions, **fields)


def write_codes(folder: Path, splits: dict[str, list[CodedSample]], tokenizer: str = "cafe") -> Path:
    written = {}
    for split, coded in splits.items():
        with ShardWriter(folder, split) as writer:
            for item in coded:
                writer.write_members(item.sample.id, item.to_members())
        written[split] = writer.shards
    write_manifest(folder, Manifest("tiny", 16, written, {"tokenizer": tokenizer}))
    return folder


def coded(number: int) -> CodedSample:
    """Codes that are easy to guess: one code all over, which the caption's number tells, and one odd corner."""
    grid = numpy.full((4, 4), number % 8, numpy.uint16)
    grid[3, 3] = 8 + number % 8
    return CodedSample(sample(number), grid)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    TextTokenizer.train([c.name for n in range(8) for c in sample(n).captions.values()] * 5, folder / "text.model", 320)
    torch.manual_seed(0)
    vqvae = VQVAE(VQVAEConfig(channels=[4, 8], residual_blocks=0, code_dim=4, codebook_size=CODES))
    name = save_part(vqvae, folder / "tokenizer")
    splits = {"train": range(40), "test-family": range(40, 50), "test-concept": range(50, 55)}
    write_codes(folder / "codes", {split: [coded(n) for n in numbers] for split, numbers in splits.items()}, name)
    return folder


def make_config(workspace: Path, out: Path, data=None, model=None, captions=None, **loop) -> GeneratorTrainConfig:
    files = {"codes": str(workspace / "codes"), "text_model": str(workspace / "text.model")}
    sizes = {"num_image_codes": CODES, "width": 16, "depth": 1, "heads": 2, "max_text": 12}
    steps = {"steps": 6, "batch_size": 8, "learning_rate": 3e-3, "warmup": 2, "log_every": 1, "eval_every": 3}
    return GeneratorTrainConfig(
        data=GeneratorDataConfig(**{**files, **(data or {})}),
        captions=CaptionMix(**(captions or {})),
        model=TransformerConfig(**{**sizes, **(model or {})}),
        loop=LoopConfig(**{"out": str(out), "precision": "float32", "device": "cpu", **steps, **loop}),
    )


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def logged(out: Path, name: str) -> list[float]:
    return [record[name] for record in read_log(out) if name in record]


# captions


def draws(config: CaptionMix, item: Sample, count: int = 4000) -> list[str]:
    return [draw_caption(item, config, random.Random(index)) for index in range(count)]


def test_captions_are_drawn_with_the_given_probabilities():
    item = Sample("a", b"", "png", {"en": Caption("name", ("k1", "k2", "k3", "k4", "k5", "k6"))}, family="noto")
    found = draws(CaptionMix(name=0.5, keywords=0.3, style=0.25, dropout=0.2), item)
    share: Counter[str] = Counter()
    for caption in found:
        share["dropout"] += not caption
        share["style"] += caption.endswith(", noto style")
        plain = caption.removesuffix(", noto style")
        share["name"] += plain == "name"
        share["keywords"] += plain.startswith("k")
        share["both"] += plain.startswith("name, k")
        words = [word for word in plain.split(", ") if word.startswith("k")]
        assert len(words) == len(set(words)) <= 4
    expected = {"dropout": 0.2, "style": 0.8 * 0.25, "name": 0.8 * 0.5, "keywords": 0.8 * 0.3, "both": 0.8 * 0.2}
    for kind, probability in expected.items():
        assert share[kind] / len(found) == pytest.approx(probability, abs=0.03), kind
    assert share["dropout"] + share["name"] + share["keywords"] + share["both"] == len(found)


def test_languages_are_drawn_evenly():
    item = Sample("a", b"", "png", {language: Caption(language) for language in LANGUAGES})
    share = Counter(draws(CaptionMix(dropout=0.0), item))
    assert set(share) == set(LANGUAGES)
    assert all(count / 4000 == pytest.approx(1 / 7, abs=0.03) for count in share.values())


def test_keywords_change_order():
    item = Sample("a", b"", "png", {"en": Caption("name", ("k1", "k2"))})
    assert set(draws(CaptionMix(name=0, keywords=1, dropout=0), item)) == {"k1", "k2", "k1, k2", "k2, k1"}


def test_a_caption_without_keywords_is_the_name():
    item = Sample("a", b"", "png", {"en": Caption("name")})
    assert set(draws(CaptionMix(name=0, keywords=1, dropout=0), item)) == {"name"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_style_is_named_in_the_language_of_the_caption(language):
    item = Sample("a", b"", "png", {language: Caption("X")}, family="fluent-emoji")
    (found,) = set(draws(CaptionMix(name=1, keywords=0, style=1, dropout=0), item, 20))
    assert found == STYLE_PHRASES[language].format(caption="X", family="fluent-emoji")
    item.family = None
    assert set(draws(CaptionMix(name=1, keywords=0, style=1, dropout=0), item, 20)) == {"X"}


def test_a_caption_depends_on_the_generator_alone():
    config = CaptionMix()
    assert draws(config, sample(1), 50) == draws(config, sample(1), 50)
    assert len(set(draws(config, sample(1), 50))) > 10


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": 1.1}, "name must be a number from 0 to 1"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"name": 0.7, "keywords": 0.4}, "must not exceed 1"),
    ],
)
def test_impossible_probabilities(change, problem):
    with pytest.raises(ValueError, match=problem):
        CaptionMix(**change)


# pairs


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
    monkeypatch.setattr(batches_module, "world_size", lambda: 2)
    for process in (0, 1):
        monkeypatch.setattr(batches_module, "rank", lambda process=process: process)
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


def test_a_batch_that_does_not_divide(workspace, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"loop\.batch_size=8 is not a multiple of accumulate x processes = 3"):
        train(make_config(workspace, tmp_path / "run", accumulate=3))
    monkeypatch.setattr(batches_module, "world_size", lambda: 3)
    with pytest.raises(ConfigError, match="= 6"):
        batches_of(workspace, tmp_path, accumulate=2)


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


# the whole training


def test_training_from_codes_to_a_folder(workspace, tmp_path):
    config = make_config(
        workspace, tmp_path / "run", data={"tokenizer": str(workspace / "tokenizer")}, ema=0.9,
        steps=60, learning_rate=2e-2, log_every=20, eval_every=30,
    )  # fmt: skip
    config.sample_prompts, config.sample_every = ["red 1", "", "红 2, noto 风格"], 30
    folder = train(config)
    assert folder == tmp_path / "run" / "generator"
    model = load_part(Transformer, folder)
    text = TextTokenizer(workspace / "text.model")
    assert model.config.tokenizer_hash == json.loads((workspace / "codes" / "manifest.json").read_text())["sources"][
        "tokenizer"
    ]
    assert model.config.text_hash == text.content_hash
    assert (model.config.num_image_codes, model.config.num_text_pieces) == (CODES, text.vocab_size)
    assert model.config.grid == (4, 4)
    out = tmp_path / "run"
    for split in ("test-family", "test-concept"):
        bits, baseline = logged(out, f"test/{split}/image_bits"), logged(out, f"test/{split}/unigram_bits")
        assert len(bits) == 2
        assert bits[-1] < bits[0]
        assert bits[-1] < baseline[-1] - 1
        tests = CodedPairs(workspace / "codes", split)
        assert baseline == pytest.approx(
            [unigram_bits(CodedPairs(workspace / "codes", "train"), tests, CODES)] * 2, rel=1e-5
        )
    assert [path.name for path in sorted((out / "sheets").iterdir())] == ["000030.png", "000060.png"]


def test_held_out_bits_are_the_mean_over_pictures(workspace, tmp_path):
    # no learning; 40 pictures, which make batches of 32 and 8
    config = make_config(workspace, tmp_path / "run", data={"test": ["train"]}, steps=1, learning_rate=0.0)
    folder = train(config)
    (found,) = logged(tmp_path / "run", "test/train/image_bits")
    sizes = load_part(Transformer, folder).config
    torch.manual_seed(config.loop.seed)
    model = Transformer(sizes).eval()
    text, pairs = TextTokenizer(workspace / "text.model"), CodedPairs(workspace / "codes", "train")
    fixed = CaptionMix(name=1.0, keywords=0.0, style=1.0, dropout=0.0)
    bits = []
    with torch.no_grad():
        for item, codes in zip(pairs.samples, pairs.codes, strict=True):
            ids = text.encode(draw_caption(item, fixed, random.Random(item.id)))
            row = training_row(model.config.vocabulary, ids, codes, model.config.max_text, model.config.position_kind)
            bits.append(float(model.loss(collate(model.config.vocabulary, [row]))["image_bits"]))
    assert found == pytest.approx(sum(bits) / len(bits), rel=1e-5)


def test_accumulation_is_one_large_batch(workspace, tmp_path):
    for accumulate in (1, 4):
        train(make_config(workspace, tmp_path / str(accumulate), accumulate=accumulate))
    losses = [logged(tmp_path / name, "train/loss") for name in ("1", "4")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("options", [{"packing": True}, {"checkpoint_gradients": True}], ids=lambda o: next(iter(o)))
def test_options_of_speed_change_no_loss(workspace, tmp_path, options):
    found = []
    for name, changes in (("without", {"packing": False}), ("with", {"packing": False, **options})):
        config = make_config(workspace, tmp_path / name, accumulate=2)
        train(replace(config, mix={"draw": 0.5, "describe": 0.5}, given_codes=0.5, **changes))
        found.append([logged(tmp_path / name, f"train/{figure}") for figure in ("loss", "image_bits", "caption_bits")])
    assert all(found[0])
    for without, with_option in zip(*found, strict=True):
        assert with_option == pytest.approx(without, rel=1e-4)


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


def test_a_resumed_training_is_the_uninterrupted_one(workspace, tmp_path, monkeypatch):
    whole = train(make_config(workspace, tmp_path / "whole", ema=0.9))
    with monkeypatch.context() as patch:
        draw = RowBatches.__call__

        def interrupted(self, step):
            if (tmp_path / "run" / "checkpoint.pt").is_file():
                raise KeyboardInterrupt
            return draw(self, step)

        patch.setattr(RowBatches, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(workspace, tmp_path / "run", ema=0.9, save_every=3))
    with pytest.raises(TrainingError, match="--resume"):
        train(make_config(workspace, tmp_path / "run", ema=0.9))
    resumed = train(make_config(workspace, tmp_path / "run", ema=0.9), resume=True)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_one_generator_learns_both_directions(workspace, tmp_path):
    loop = {"steps": 160, "batch_size": 16, "learning_rate": 1e-2, "eval_every": 80, "log_every": 80}
    captions = {"name": 1.0, "keywords": 0.0}
    config = make_config(workspace, tmp_path, captions=captions, model={"width": 32}, **loop)
    folder = train(replace(config, mix={"draw": 1, "describe": 1}))
    first, last = logged(tmp_path, "test/test-family/caption_bits")
    assert last < first < 3
    images = logged(tmp_path, "test/test-family/image_bits")
    assert images[-1] < images[0]
    # a caption is likelier for the picture that it describes than for others
    model, text = load_part(Transformer, folder).float(), TextTokenizer(workspace / "text.model")
    codes = torch.stack([torch.from_numpy(coded(number).codes.astype(numpy.int64)) for number in range(8)])
    scores = torch.stack([caption_log_probabilities(model, codes, text.encode(f"en: red {n}")) for n in range(8)])
    assert float(scores.diagonal().mean() - scores.mean()) > 0.5


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


def test_the_mixture_is_read_and_checked_with_the_configuration():
    assert load_config(GeneratorTrainConfig, None, ["mix={draw: 1, describe: 3}"]).mix == {"draw": 1, "describe": 3}
    with pytest.raises(ConfigError, match="unknown kind of rows 'sing'; use draw, describe$"):
        load_config(GeneratorTrainConfig, None, ["mix.sing=1"])
    with pytest.raises(ConfigError, match=r"unknown key captions\.image_first"):
        load_config(GeneratorTrainConfig, None, ["captions.image_first=0.5"])


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


def test_training_starts_from_a_trained_generator(workspace, tmp_path):
    folder = train(make_config(workspace, tmp_path / "first", steps=40))
    again = make_config(workspace, tmp_path / "second", steps=1, learning_rate=1e-9, eval_every=1)
    again.start_from = str(folder)
    train(again)
    before, after = (logged(tmp_path / run, "test/test-family/image_bits")[-1] for run in ("first", "second"))
    assert after == pytest.approx(before, abs=0.02)  # it was stored in bfloat16
    other = make_config(workspace, tmp_path / "third", model={"width": 32})
    other.start_from = str(folder)
    with pytest.raises(ConfigError, match="another configuration"):
        train(other)


def test_a_loss_that_is_not_finite_names_the_samples(workspace, tmp_path, monkeypatch):
    original = Transformer.loss

    def broken(self, batch, total_weight=None):
        losses = original(self, batch, total_weight)
        return {**losses, "loss": losses["loss"] * math.nan}

    monkeypatch.setattr(Transformer, "loss", broken)
    with pytest.raises(TrainingError, match=r"at step 0: not finite.*samples: (s\d\d\d(, )?){8}$"):
        train(make_config(workspace, tmp_path / "run"))
    assert not (tmp_path / "run" / "generator").exists()


def test_codes_beyond_the_vocabulary(workspace, tmp_path):
    with pytest.raises(ConfigError, match=r"model.num_image_codes=8, but .* holds larger codes"):
        train(make_config(workspace, tmp_path / "run", model={"num_image_codes": 8}))


def test_another_image_tokenizer(workspace, tmp_path):
    torch.manual_seed(1)
    save_part(VQVAE(VQVAEConfig(channels=[4, 8], codebook_size=CODES)), tmp_path / "other")
    config = make_config(workspace, tmp_path / "run", data={"tokenizer": str(tmp_path / "other")})
    with pytest.raises(ConfigError, match="is not the tokenizer that made the codes"):
        train(config)


# two processes


def run_torchrun(config: GeneratorTrainConfig, path: Path, processes: int) -> subprocess.CompletedProcess[str]:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, "-m", "mmwudao", "train", "generator", str(path)],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], timeout=500,
    )  # fmt: skip


def test_two_processes_log_the_losses_of_one(workspace, tmp_path):
    settings = {"accumulate": 2, "ema": 0.9}
    done = run_torchrun(make_config(workspace, tmp_path / "two", **settings), tmp_path / "two.yaml", 2)
    assert done.returncode == 0, done.stderr
    train(make_config(workspace, tmp_path / "one", **settings))
    for name in ("train/loss", "train/image_bits", "train/gradient_norm", "test/test-family/image_bits"):
        one, two = logged(tmp_path / "one", name), logged(tmp_path / "two", name)
        assert len(one) == len(two) >= 2
        assert two == pytest.approx(one, rel=1e-5), name
    load_part(Transformer, tmp_path / "two" / "generator")
