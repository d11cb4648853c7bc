"""Vectors of frozen towers in the prompt: rows, the model, every way to draw, and training from vectors on disk."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from data.config import ConfigError, load_config
from data.reading import Example
from data.sample import DataError
from data.styles import without_style
from data.text import TextTokenizer
from generation.drawing.decoding import generate_codes
from generation.drawing.engines import Engine, Kind, StaticStep, make_cache, make_step
from generation.drawing.prompts import pad_prompts, prefill
from generation.drawing.ragged_cache import RaggedCache
from generation.drawing.sampling import SamplingOptions
from generation.rows.prompt import Prompt
from generation.rows.row import Row, collate, pack
from generation.training.batches import RowBatches, RowMaker
from generation.training.config import GeneratorTrainConfig
from generation.training.features import StoredFeatures, caption_names, prepare_features
from generation.training.pairs import CodedPairs
from generation.training.train_generator import _start, train
from generation.transformer.config import TransformerConfig
from generation.transformer.int8 import quantise
from generation.transformer.model import Transformer
from generation.transformer.prompt_features import PromptFeatures
from tests.helpers.generators import GRID, PRESETS, PROMPTS, SEEDS, SIZES, make_model
from tests.helpers.tiny_codes import logged, make_config, sample, write_workspace
from vqvae.storage.parts import load_part, save_part

WIDTH = 5
FEATURES = PromptFeatures("text", WIDTH, "cafe" * 16)
SAMPLED = SamplingOptions(temperature=0.9, top_k=20, guidance=2.0)


def vector(text: str) -> Tensor:
    """[1, WIDTH], of unit length, decided by the text."""
    generator = torch.Generator().manual_seed(int.from_bytes(sha256(text.encode()).digest()[:6], "big"))
    return torch.nn.functional.normalize(torch.randn(1, WIDTH, generator=generator), dim=-1)


class Encoder:
    hash = "cafe" * 16

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode_text(self, texts):
        self.asked += texts
        return torch.cat([vector(text) for text in texts])

    def encode_image(self, images):
        return torch.cat([vector(f"colour {image.getpixel((0, 0))[0]}") for image in images])


@pytest.fixture(scope="module", params=["modern", "cogview"])
def model(request) -> Transformer:
    preset = getattr(TransformerConfig, request.param)
    return make_model(preset(**SIZES, prompt_features=FEATURES))


def prompts(names: str = "abcdefghijkl") -> list[Prompt]:
    """The prompts of the other tests, each with the vector of its name; the second has none."""
    vectors = [None if k == 1 else vector(name) for k, name in enumerate(names)]
    return [Prompt(tuple(pieces), one) for pieces, one in zip(PROMPTS, vectors, strict=True)]


def draw(model: Transformer, given: list, seeds=SEEDS, options=SAMPLED, **more) -> Tensor:
    return generate_codes(model, given, seeds, options, grid=GRID, **more)


def test_a_vector_changes_the_picture_and_a_vector_of_zeros_does_not(model):
    found = draw(model, prompts())
    nothing = [Prompt(tuple(pieces), torch.zeros(1, WIDTH)) for pieces in PROMPTS]
    without, zeros = draw(model, PROMPTS), draw(model, nothing)
    assert torch.equal(without, zeros)
    same = (found == without).flatten(1).all(dim=1)
    assert same[1]
    assert same.sum() == 1
    assert not torch.equal(found, draw(model, prompts("lkjihgfedcba")))


def test_a_picture_is_the_same_in_any_company(model):
    given = prompts()
    together = draw(model, given)
    for k in (0, 1, 11):
        assert torch.equal(draw(model, given[k : k + 1], SEEDS[k : k + 1])[0], together[k])
    # equal pieces with other vectors are not read once
    twins = [Prompt((1, 2, 3), vector(name)) for name in "ax"]
    first, second = draw(model, twins, [5, 5])
    assert not torch.equal(first, second)
    assert torch.equal(draw(model, twins[1:], [5])[0], second)


def test_windows_draw_the_same_pictures(model):
    options = replace(SAMPLED, window=4)
    torch.testing.assert_close(draw(model, prompts(), options=options), draw(model, prompts()), rtol=0, atol=0)


def test_given_codes_are_kept_and_the_rest_follows_the_vector(model):
    given = torch.full((len(PROMPTS), *GRID), -1)
    given[:, :2] = 3
    given[0, 2, 0] = 1
    found, without = (draw(model, some, given_codes=given) for some in (prompts(), PROMPTS))
    assert (found[given >= 0] == given[given >= 0]).all()
    assert not torch.equal(found, without)
    alone = draw(model, prompts()[:1], SEEDS[:1], given_codes=given[:1])
    assert torch.equal(alone[0], found[0])


@torch.inference_mode()
def logits(model: Transformer, kind: Kind, ragged: bool = False) -> Tensor:
    padded = pad_prompts(model.config, prompts()[:4], GRID)
    cache = make_cache(kind, model, padded.hidden)
    results = [prefill(model, padded, cache)]
    step = make_step(kind, model, padded.code_positions, cache)
    if ragged:
        assert isinstance(cache, RaggedCache)
        step = StaticStep(model, padded.code_positions, cache, lambda run: run, 8)
    results += [step(torch.arange(4) + place, place).clone() for place in range(5)]
    return torch.stack(results)


def test_all_engines_give_the_same_logits(model):
    modules = logits(model, "modules")
    torch.testing.assert_close(logits(model, "graph", ragged=True), modules, atol=2e-5, rtol=1e-5)
    if Engine().resolved(model) == "fused":
        torch.testing.assert_close(logits(model, "fused"), modules, atol=2e-5, rtol=1e-5)


def test_8_bits_leave_the_map_as_it_is():
    pytest.importorskip("torchao")
    model = make_model(TransformerConfig.modern(**SIZES, prompt_features=FEATURES))
    map_of = model.get_submodule("feature_map")
    before = map_of.get_parameter("weight").clone()
    quantise(model)
    assert torch.equal(map_of.get_parameter("weight"), before)
    assert not torch.equal(draw(model, prompts()), draw(model, PROMPTS))


def test_features_that_the_model_does_not_read(model):
    with pytest.raises(ValueError, match=r"reads vectors \[1, 5\] in its prompts, not \[1, 6\]"):
        draw(model, [Prompt((1,), torch.zeros(1, 6))], [0])
    with pytest.raises(ValueError, match="reads no vectors"):
        draw(make_model(PRESETS["modern"]), [Prompt((1,), torch.zeros(1, 5))], [0])


def test_without_features_a_model_has_the_weights_that_it_had():
    torch.manual_seed(0)
    plain = Transformer(PRESETS["modern"])
    torch.manual_seed(0)
    featured = Transformer(replace(PRESETS["modern"], prompt_features=FEATURES))
    weights = featured.state_dict()
    assert weights.pop("feature_map.weight").shape == (SIZES["width"], WIDTH)
    assert weights.keys() == plain.state_dict().keys()
    assert all(torch.equal(one, weights[name]) for name, one in plain.state_dict().items())


def test_the_configuration_survives_the_disk(model, tmp_path):
    save_part(model, tmp_path / "generator", torch.float32)
    loaded = load_part(Transformer, tmp_path / "generator")
    assert loaded.config == model.config
    assert torch.equal(draw(loaded, prompts()), draw(model, prompts()))


# rows and training


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return write_workspace(tmp_path_factory.mktemp("features"))


def featured(config: GeneratorTrainConfig, **data: Any) -> GeneratorTrainConfig:
    model = replace(config.model, prompt_features=PromptFeatures("text"))
    return replace(config, model=model, data=replace(config.data, **data))


@pytest.fixture
def batches(workspace, tmp_path):
    """Makes the batches of a training."""
    pairs = CodedPairs(workspace / "codes", "train")
    names = {caption.name for item in pairs.samples for caption in item.captions.values()}
    stored = prepare_features(tmp_path / "features.safetensors", Encoder(), names)

    def make(**changes) -> RowBatches:
        config = make_config(workspace, tmp_path / "run", **changes)
        model = replace(config.model, num_text_pieces=320, grid=(4, 4), prompt_features=FEATURES)
        return RowBatches(pairs, RowMaker(TextTokenizer(workspace / "text.model"), model, config, stored))

    return make


def test_a_row_has_the_vector_of_its_name_and_none_without_its_caption(batches):
    made = batches(captions={"name": 0.3, "keywords": 0.4, "style": 0.5, "dropout": 0.3}, batch_size=32)
    made.maker.config.packing = False
    ((batch, _), ids) = next(made(0))
    empty = (batch.features == 0).flatten(1).all(dim=1)
    assert 2 < empty.sum() < 20
    # without a caption [SIZE] follows [ROI1] at once
    sizes = made.maker.model.vocabulary.size_command((4, 4))
    assert torch.equal(batch.tokens[:, 1] == sizes, empty)
    names = {item.id: [caption.name for caption in item.captions.values()] for item in made.pairs.samples}
    for name, row in zip(ids, batch.features, strict=True):
        if row.any():
            assert any(torch.allclose(row, vector(one), atol=1e-3) for one in names[name])


def test_packed_and_padded_rows_have_the_same_loss(batches):
    made = batches(captions={"dropout": 0.3})
    model = make_model(made.maker.model)
    losses = []
    for packing in (True, False):
        made.maker.config.packing = packing
        (((batch, total), _),) = made(3)
        assert (batch.lengths is not None) == packing
        losses.append(model.loss(batch, total)["loss"])
        gradients = torch.autograd.grad(losses[-1], model.get_parameter("feature_map.weight"))
        assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(losses[0], losses[1])


def test_a_batch_is_moved_with_its_features():
    rows = [Row(torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2), torch.ones(2, dtype=torch.int64),
                torch.ones(2, dtype=torch.bool), features=vector(name)) for name in "ab"]  # fmt: skip
    for together in (collate, pack):
        batch = together(PRESETS["modern"].vocabulary, rows).to("cpu")
        assert batch.features is not None
        assert torch.equal(batch.features, torch.cat([vector("a"), vector("b")]))
    with pytest.raises(AssertionError, match="or none"):
        collate(PRESETS["modern"].vocabulary, [rows[0], replace(rows[1], features=None)])


def test_vectors_are_made_once_and_only_where_they_are_missing(tmp_path):
    path, encoder = tmp_path / "features.safetensors", Encoder()
    prepare_features(path, encoder, ["b", "a", "cc"])
    assert encoder.asked == ["a", "b", "cc"]
    stored = prepare_features(path, encoder, ["cc", "d"])
    assert encoder.asked == ["a", "b", "cc", "d"]
    content = path.read_bytes()
    prepare_features(path, encoder, ["d", "a"])
    assert len(encoder.asked) == 4
    assert path.read_bytes() == content
    for text in ("a", "b", "cc", "d"):
        torch.testing.assert_close(stored.of_text(text), vector(text), atol=1e-3, rtol=0)
    with pytest.raises(DataError, match="holds no vector of 'e'"):
        stored.of_text("e")


def test_vectors_of_other_towers_and_damaged_files(tmp_path):
    path, encoder = tmp_path / "features.safetensors", Encoder()
    prepare_features(path, encoder, ["a"])
    encoder.hash = "beef" * 16
    with pytest.raises(ConfigError, match=r"of the towers cafecafecafe, not of these \(beefbeefbeef\)"):
        prepare_features(path, encoder, ["a"])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="truncated or damaged"):
        StoredFeatures(path)


def test_training_reads_vectors_from_disk_and_learns_from_them(workspace, tmp_path):
    encoder, path = Encoder(), tmp_path / "features.safetensors"
    config = featured(make_config(workspace, tmp_path / "run", steps=8), features=str(path))
    config = replace(config, mix={"draw": 0.7, "describe": 0.3}, sample_prompts=["red 1, noto style"], sample_every=8)
    config.data.tokenizer = str(workspace / "tokenizer")
    folder = train(config, encoder=encoder)
    made = load_part(Transformer, folder)
    assert made.config.prompt_features == PromptFeatures("text", WIDTH, encoder.hash)
    assert set(encoder.asked) == {caption.name for n in range(8) for caption in sample(n).captions.values()}
    assert len(encoder.asked) == len(set(encoder.asked))
    # again without towers, from the file alone: the same training
    again = replace(config, loop=replace(config.loop, out=str(tmp_path / "again")))
    train(again)
    assert logged(tmp_path / "again", "train/loss") == logged(tmp_path / "run", "train/loss")
    assert (tmp_path / "run" / "sheets" / "000008.png").read_bytes() == (
        tmp_path / "again" / "sheets" / "000008.png"
    ).read_bytes()


def test_the_file_is_named_after_the_towers(workspace, tmp_path):
    config = featured(make_config(workspace, tmp_path / "run", steps=1))
    with pytest.raises(ConfigError, match=r"name the towers that make the vectors in data\.towers"):
        train(config)
    train(config, encoder=Encoder())
    assert (workspace / "codes" / "features-cafecafecafe.safetensors").is_file()


def test_a_file_that_lacks_a_name(workspace, tmp_path):
    path = tmp_path / "features.safetensors"
    prepare_features(path, Encoder(), ["red 1"])
    config = featured(make_config(workspace, tmp_path / "run", steps=1), features=str(path))
    with pytest.raises(ConfigError, match=r"holds no vector of .* and 5[45] more: name data\.towers"):
        train(config)


def test_a_misspelt_setting(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {prompt_features: {kin: text}}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"unknown key model\.prompt_features\.kin; known here: kind"):
        load_config(GeneratorTrainConfig, path)
    found = load_config(GeneratorTrainConfig, None, ["model.prompt_features.kind=text"])
    assert found.model.prompt_features == PromptFeatures("text")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat, noto style", "a cat"),
        ("猫, noto-v1 风格", "猫"),
        ("a cat, sports style", "a cat, sports style"),
        (", noto style", ", noto style"),
        ("a noto cat", "a noto cat"),
    ],
)
def test_a_style_phrase_is_left_out(text, expected):
    assert without_style(text, ["noto", "noto-v1"]) == expected


def test_rows_with_the_vector_of_the_picture(workspace, tmp_path):
    pairs = CodedPairs(workspace / "codes", "train")
    shown = {item.id: Image.new("RGB", (4, 4), (number, 0, 0)) for number, item in enumerate(pairs.samples)}
    asked = []

    def pictures():
        for item in pairs.samples:
            asked.append(item.id)
            yield Example(item, shown[item.id])

    path, names = tmp_path / "features.safetensors", caption_names(pairs.samples)
    prepare_features(path, Encoder(), names)
    stored = prepare_features(path, Encoder(), names, shown, pictures())
    assert asked == list(shown)
    prepare_features(path, Encoder(), names, shown, pictures())
    assert asked == list(shown)
    config = make_config(workspace, tmp_path / "run", captions={"dropout": 0.2}, batch_size=200)
    model = replace(config.model, num_text_pieces=320, grid=(4, 4), prompt_features=replace(FEATURES, kind="both"))
    config = replace(config, model=model, from_picture=0.5, packing=False)
    made = RowBatches(pairs, RowMaker(TextTokenizer(workspace / "text.model"), model, config, stored))
    (batch, _), ids = next(made(0))
    no_text = batch.tokens[:, 1] == model.vocabulary.size_command((4, 4))
    own = torch.cat([vector(f"colour {list(shown).index(one)}") for one in ids])
    assert batch.features is not None
    of_picture = (batch.features - own).abs().amax(dim=1) < 1e-3
    nothing = (batch.features == 0).all(dim=1)
    assert 50 < of_picture.sum() < 110
    assert 20 < (of_picture & no_text).sum() < 60
    assert torch.equal(nothing, no_text & ~of_picture)
    with pytest.raises(ValueError, match="from_picture above 0 and model.prompt_features.kind=both go together"):
        replace(config, from_picture=0.0)


def test_a_generator_goes_on_with_the_vectors_of_other_towers(tmp_path):
    config = TransformerConfig.modern(**SIZES, prompt_features=FEATURES)
    trained = make_model(config)
    save_part(trained, tmp_path / "generator")
    others = replace(config, prompt_features=replace(FEATURES, towers_hash="f" * 64))
    going_on = _start(str(tmp_path / "generator"), others)
    assert going_on.config.prompt_features.towers_hash == "f" * 64
    for name, weight in trained.state_dict().items():
        assert torch.equal(going_on.state_dict()[name], weight.bfloat16().float()), name
    wider = replace(config, prompt_features=replace(FEATURES, width=FEATURES.width * 2))
    with pytest.raises(ConfigError, match="another configuration or of other parts"):
        _start(str(tmp_path / "generator"), wider)
