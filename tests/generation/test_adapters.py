"""Learning a style on a frozen generator, and drawing with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from data.codes import CodedSample
from data.config import ConfigError
from data.sample import Caption, DataError, Sample
from data.shards import Manifest, ShardWriter, write_manifest
from generation.drawing.decoding import generate_codes
from generation.drawing.sampling import SamplingOptions
from generation.rows.draw import prompt_row
from generation.rows.texts import CaptionMix
from generation.rows.vocabulary import Vocabulary
from generation.training.train_style import StyleBase, StyleTrainConfig, train
from generation.transformer.adapters import AdapterOptions, apply_adapter, make_trainable, save_adapter
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from mmwudao.cli.app import run
from mmwudao.loading.model_dir import assemble_model, read_model_config
from mmwudao.pipeline import load
from tests.helpers.naive_decoding import naive_generate_codes
from vqvae.storage.parts import ModelError, content_hash, save_part
from vqvae.training.config import LoopConfig

SMALL = {"prompt_vectors": 2, "encoder_width": 4, "rank": 1}
PIECES = [[5, 6, 7], [8], [9, 10]]


def make_base(folder: Path, tiny: Path, seed: int = 0) -> Path:
    """The tiny model with a generator large enough for an adapter of under 2 % of its size."""
    torch.manual_seed(seed)
    parts = read_model_config(tiny).parts
    config = TransformerConfig.modern(
        num_image_codes=32, num_text_pieces=400, width=64, depth=2, heads=2, max_text=24, grid=(4, 4),
        tokenizer_hash=parts["tokenizer"].hash, text_hash=parts["text"].hash,
    )  # fmt: skip
    generator = Transformer(config)
    for parameter in generator.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(4)  # new weights are so small that a prompt would hardly be heard
    save_part(generator, folder.parent / f"{folder.name}-generator", torch.float32)
    return assemble_model(
        tiny / "tokenizer", folder.parent / f"{folder.name}-generator", tiny / "text.model", folder,
        name="base", image_size=32, styles=["noto"], languages=["en"],
        default_sampling=SamplingOptions(temperature=0.9, guidance=2.0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def base_dir(tiny_model_dir: Path, tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", tiny_model_dir)


@pytest.fixture(scope="module")
def codes(base_dir: Path, tmp_path_factory) -> Path:
    """Pictures of the family "cubes", which are all much alike, and some of another family."""
    folder = tmp_path_factory.mktemp("style") / "codes"
    rng = numpy.random.default_rng(0)
    splits = {}
    for split, count in (("train", 24), ("test-family", 6), ("test-concept", 6)):
        with ShardWriter(folder, split) as writer:
            for k in range(count):
                family = "cubes" if k % 3 else "noto"
                grid = numpy.where(rng.random((4, 4)) < 0.8, 7, rng.integers(0, 32, (4, 4))).astype(numpy.uint16)
                caption = Caption(("red heart", "blue fish", "moon")[k % 3], ("x", "y"))
                sample = Sample(f"{split}{k:02d}", b"", "png", {"en": caption}, family=family, base_concept=f"c{k}")
                writer.write_members(sample.id, CodedSample(sample, grid).to_members())
        splits[split] = writer.shards
    tokenizer = read_model_config(base_dir).parts["tokenizer"].hash
    write_manifest(folder, Manifest("tiny", 32, splits, {"tokenizer": tokenizer}))
    return folder


def style_config(codes: Path, out: Path, adapter=None, captions=None, **changes) -> StyleTrainConfig:
    loop = LoopConfig(
        out=str(out), steps=30, batch_size=8, learning_rate=2e-2, warmup=2, precision="float32", device="cpu",
        log_every=10, eval_every=30,
    )  # fmt: skip
    return StyleTrainConfig(
        codes=str(codes),
        family=changes.pop("family", "cubes"),
        captions=CaptionMix(**{"style": 0.0, **(captions or {})}),
        adapter=AdapterOptions(**{**SMALL, **(adapter or {})}),
        loop=loop,
        **changes,
    )


def train_on(base_dir: Path, config: StyleTrainConfig):
    """The base as training left it, and the adapter's folder."""
    pipe = load(base_dir, device="cpu", dtype="float32")
    return pipe, train(config, StyleBase(pipe.generator, pipe.text, pipe.config.parts["generator"].hash))


@pytest.fixture(scope="module", params=["ptuning", "lora", "both"])
def trained(request, base_dir: Path, codes: Path, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    return request.param, *train_on(base_dir, style_config(codes, out, {"method": request.param})), out


@pytest.fixture(scope="module")
def adapter(base_dir: Path, tmp_path_factory) -> Path:
    return random_adapter(base_dir, tmp_path_factory.mktemp("random") / "adapter")


def random_adapter(base_dir: Path, folder: Path, seed: int = 0, **options) -> Path:
    """An adapter that was never trained but changes what is drawn: LoRA's second factor is not left at 0."""
    torch.manual_seed(seed)
    pipe = load(base_dir, device="cpu", dtype="float32")
    chosen = AdapterOptions(**{**SMALL, **options})
    make_trainable(pipe.generator, chosen)
    for name, parameter in pipe.generator.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(pipe.generator, folder, "cubes", chosen, pipe.config.parts["generator"].hash)
    return folder


def base_weights(pipe) -> dict[str, torch.Tensor]:
    """The generator's own tensors, where LoRA and the prompt have put them."""
    named = {name.replace(".base_layer", ""): tensor for name, tensor in pipe.generator.state_dict().items()}
    return {name: tensor for name, tensor in named.items() if "lora_" not in name and "prompt" not in name}


def logits(model: Transformer, text: list[int]) -> torch.Tensor:
    row = prompt_row(model.config.vocabulary, text, (4, 4), model.config.max_text)
    positions = torch.arange(len(row)).unsqueeze(1).expand(-1, 2)
    with torch.inference_mode():
        return model.logits(model(torch.tensor([row]), positions[None])[:, -1], image_only=True)[0]


def prompted(model: Transformer, pieces: list[int]) -> list[int]:
    return [*model.config.vocabulary.prompt_pieces, *pieces]


def test_prompt_pieces_are_ids_of_their_own() -> None:
    vocab = Vocabulary(32, 400, 2)
    assert vocab.prompt_pieces == [400, 401]
    assert vocab.text([399, 400, 401]) == [431, vocab.padded_size, vocab.padded_size + 1]
    assert Vocabulary(32, 400).padded_size == vocab.padded_size
    for outside in ([-1], [402]):
        with pytest.raises(ValueError, match=r"0\.\.401"):
            vocab.text(outside)
    with pytest.raises(ValueError, match=r"0\.\.399"):
        Vocabulary(32, 400).text([400])


def test_training_learns_the_style_and_leaves_the_base_alone(trained, base_dir: Path) -> None:
    method, pipe, folder, out = trained
    untouched = load(base_dir, device="cpu", dtype="float32").generator.state_dict()
    after = base_weights(pipe)
    assert after.keys() == untouched.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in untouched.items())
    names = {name for name, parameter in pipe.generator.named_parameters() if parameter.requires_grad}
    assert any("prompt" in name for name in names) == (method != "lora")
    assert any("lora_" in name for name in names) == (method != "ptuning")
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = next(record for record in reversed(records) if "test/test-family/image_bits" in record)
    for split in ("test-family", "test-concept"):
        assert last[f"test/{split}/image_bits"] < last[f"test/{split}/base_bits"] - 0.05
    assert folder == out / "adapter"
    assert {file.name for file in folder.iterdir()} == {"config.json", "adapter.safetensors"}


def test_a_stored_adapter_draws_as_the_trained_one(trained, base_dir: Path) -> None:
    """The folded prompt and merged LoRA against the LSTM and peft's own layers."""
    _, pipe, folder, _ = trained
    loaded = [load(base_dir, device="cpu", dtype="float32", adapter=folder).generator for _ in range(2)]
    texts = [prompted(pipe.generator, pieces) for pieces in PIECES]
    for text in texts:
        torch.testing.assert_close(logits(loaded[0], text), logits(pipe.generator, text), atol=1e-4, rtol=0)
    options = SamplingOptions(guidance=2.0)
    first, again = (generate_codes(model, texts, [1, 2, 3], options, grid=(4, 4)) for model in loaded)
    assert torch.equal(first, again)
    unadapted = load(base_dir, device="cpu", dtype="float32").generator
    assert not torch.equal(first, generate_codes(unadapted, PIECES, [1, 2, 3], options, grid=(4, 4)))


def test_prompt_vectors_change_the_prompted_row_alone(base_dir: Path, tmp_path: Path) -> None:
    folder = random_adapter(base_dir, tmp_path / "adapter", method="ptuning")
    base = load(base_dir, device="cpu", dtype="float32").generator
    adapted = load(base_dir, device="cpu", dtype="float32", adapter=folder).generator
    assert torch.equal(logits(adapted, []), logits(base, []))
    assert torch.equal(logits(adapted, PIECES[0]), logits(base, PIECES[0]))
    assert (logits(adapted, prompted(adapted, PIECES[0])) - logits(base, PIECES[0])).abs().max() > 1e-3
    swapped = [*reversed(adapted.config.vocabulary.prompt_pieces), *PIECES[0]]
    assert not torch.equal(logits(adapted, swapped), logits(adapted, prompted(adapted, PIECES[0])))


def test_lora_changes_both_rows(base_dir: Path, tmp_path: Path) -> None:
    folder = random_adapter(base_dir, tmp_path / "adapter", method="lora")
    base = load(base_dir, device="cpu", dtype="float32").generator
    adapted = load(base_dir, device="cpu", dtype="float32", adapter=folder).generator
    assert adapted.config.vocabulary.prompt_pieces == []
    for text in ([], PIECES[0]):
        assert (logits(adapted, text) - logits(base, text)).abs().max() > 1e-3


def test_the_engine_draws_what_the_naive_loop_draws(base_dir: Path, adapter: Path) -> None:
    model = load(base_dir, device="cpu", dtype="float32", adapter=adapter).generator
    texts = [prompted(model, pieces) for pieces in PIECES]
    options = SamplingOptions(guidance=2.0, top_k=20)
    drawn = generate_codes(model, texts, [1, 2, 3], options, grid=(4, 4))
    assert torch.equal(drawn, naive_generate_codes(model, texts, [1, 2, 3], options, grid=(4, 4)))


def test_a_picture_is_the_same_in_any_batch(base_dir: Path, adapter: Path) -> None:
    pipe = load(base_dir, device="cpu", dtype="float32", adapter=adapter)
    together = pipe.generate("red heart", n=9, seed=3)
    alone = pipe.generate("red heart", seed=8)[0]
    assert alone.tobytes() == together[5].tobytes()
    assert pipe.adapter is not None
    assert alone.info["adapter_hash"] == pipe.adapter.hash


def test_words_that_find_no_place_are_reported(base_dir: Path, adapter: Path, caplog) -> None:
    pipe = load(base_dir, device="cpu", dtype="float32", adapter=adapter)
    pieces = pipe.encode_text("moon and stars " * 20)
    assert len(pieces) == pipe.generator.config.max_text
    assert pieces[:2] == pipe.generator.config.vocabulary.prompt_pieces
    assert "reads 22 pieces" in caplog.text


def test_the_base_on_disk_stays_as_it_is(base_dir: Path, adapter: Path) -> None:
    """Weights are mapped files, and the adapter is added to them in place."""
    weights = base_dir / "generator" / "model.safetensors"
    before = weights.read_bytes()
    load(base_dir, device="cpu", dtype="bfloat16", adapter=adapter).generate("blue fish", seed=5)
    assert weights.read_bytes() == before


def test_an_unadapted_pipeline_is_what_it_was(base_dir: Path, adapter: Path) -> None:
    pipe = load(base_dir, device="cpu", dtype="float32")
    before = pipe.generate("blue fish", seed=5)[0]
    styled = load(base_dir, device="cpu", dtype="float32", adapter=adapter).generate("blue fish", seed=5)[0]
    after = pipe.generate("blue fish", seed=5)[0]
    assert after.tobytes() == before.tobytes() != styled.tobytes()
    assert after.info == before.info
    assert "adapter_hash" not in before.info


@pytest.mark.parametrize("method", ["ptuning", "lora", "both"])
def test_two_percent_is_enforced(base_dir: Path, method: str) -> None:
    generator = load(base_dir, device="cpu", dtype="float32").generator
    total = sum(parameter.numel() for parameter in generator.parameters())
    small: dict[str, Any] = {**SMALL, "method": method}
    large = AdapterOptions(**{**small, "rank": 2, "encoder_width": 32})
    with pytest.raises(ConfigError, match="it must stay under 2%: lower rank"):
        make_trainable(generator, large)
    generator = load(base_dir, device="cpu", dtype="float32").generator
    count = make_trainable(generator, AdapterOptions(**small))
    trained = [parameter for parameter in generator.parameters() if parameter.requires_grad]
    assert count == sum(parameter.numel() for parameter in trained) < 0.02 * total


def test_options_that_cannot_be(base_dir: Path, codes: Path) -> None:
    generator = load(base_dir, device="cpu", dtype="float32").generator
    with pytest.raises(ConfigError, match="leaves no place for words"):
        make_trainable(generator, AdapterOptions(method="ptuning", prompt_vectors=24, encoder_width=4))
    for options in ({"rank": 0}, {"prompt_vectors": 0}, {"encoder_width": 3}, {"alpha": 0.0}):
        with pytest.raises(ValueError, match="must be|even"):
            AdapterOptions(**options)
    with pytest.raises(ValueError, match=r"captions\.style"):
        StyleTrainConfig(captions=CaptionMix(style=0.5))


def test_an_adapter_of_another_generator_is_refused(adapter: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", tiny_model_dir, seed=1)
    with pytest.raises(ModelError, match="an adapter of another generator"):
        load(other, device="cpu", dtype="float32", adapter=adapter)


def _truncate(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def _flip(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "is damaged"),
        (_flip, "is damaged"),
        (lambda folder: (folder / "adapter.safetensors").unlink(), "no adapter: adapter.safetensors is missing"),
        (shutil.rmtree, "no adapter: config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "does not describe an adapter"),
        (lambda folder: _edit(folder, format="x"), "does not describe an adapter"),
        (lambda folder: _edit(folder, alpha="much"), "alpha"),
        (lambda folder: _edit(folder, method="magic"), "method"),
    ],
)
def test_a_damaged_adapter_is_refused(base_dir: Path, adapter: Path, tmp_path: Path, damage, message: str) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load(base_dir, device="cpu", dtype="float32", adapter=folder)


@pytest.mark.parametrize(
    "tensors",
    [
        {"prompt": torch.zeros(2, 63)},
        {"blocks.9.mlp.expand.lora_A": torch.zeros(1, 64), "blocks.9.mlp.expand.lora_B": torch.zeros(384, 1)},
        {"blocks.0.mlp.expand.lora_A": torch.zeros(1, 64)},
        {"blocks.0.mlp.expand.lora_A": torch.zeros(1, 64), "blocks.0.mlp.expand.lora_B": torch.zeros(384, 2)},
        {"blocks.0.mlp.expand.lora_A": torch.zeros(1, 64), "blocks.0.mlp.expand.lora_B": torch.zeros(64, 1)},
    ],
    ids=["width", "layer", "half", "rank", "shape"],
)
def test_tensors_that_do_not_fit_are_refused(base_dir: Path, adapter: Path, tmp_path: Path, tensors) -> None:
    from hashlib import sha256

    from safetensors.torch import save

    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    data = save({"blocks.0.attention.qkv.lora_A": torch.ones(1, 64),
                 "blocks.0.attention.qkv.lora_B": torch.ones(192, 1), **tensors})  # fmt: skip
    (folder / "adapter.safetensors").write_bytes(data)
    _edit(folder, weights=sha256(data).hexdigest())
    pipe = load(base_dir, device="cpu", dtype="float32")
    before = content_hash(pipe.generator)
    with pytest.raises(ModelError, match="does not fit the generator"):
        apply_adapter(pipe.generator, folder, pipe.config.parts["generator"].hash)
    assert content_hash(pipe.generator) == before


def test_unknown_families_and_foreign_codes_are_named(base_dir: Path, codes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no pictures of the chosen families \(cats\); it has cubes, noto"):
        train_on(base_dir, style_config(codes, tmp_path / "a", family="cats"))
    foreign = tmp_path / "codes"
    shutil.copytree(codes, foreign)
    manifest = json.loads((foreign / "manifest.json").read_text())
    manifest["sources"]["tokenizer"] = "cafe"
    (foreign / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="made by another image tokenizer"):
        train_on(base_dir, style_config(foreign, tmp_path / "b"))


def test_the_command_line(base_dir: Path, codes: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("style.yaml").write_text(
        f"base: {base_dir}\ncodes: {codes}\nfamily: cubes\ncaptions: {{style: 0.0}}\n"
        "adapter: {prompt_vectors: 2, encoder_width: 4, rank: 1}\n"
        "loop: {out: run, steps: 2, batch_size: 4, warmup: 1, precision: float32, device: cpu}\n"
    )
    assert run(["train", "style", "style.yaml", "family=cats"]) == 2
    assert capsys.readouterr().err.startswith("error: split 'train' of")
    assert run(["train", "style", "style.yaml"]) == 0
    assert capsys.readouterr().out.endswith("run/adapter\n")
    model = ["--model", str(base_dir), "--device", "cpu"]
    assert run(["generate", "moon", "--seed", "1", "-o", "with", "--adapter", "run/adapter", *model]) == 0
    assert run(["generate", "moon", "--seed", "1", "-o", "without", *model]) == 0
    assert run(["replay", "with/moon-1.png", "--adapter", "run/adapter", *model]) == 0
    assert "identical to the original" in capsys.readouterr().out
    other = str(random_adapter(base_dir, tmp_path / "other", seed=1))
    for picture, given, message in (
        ("with", [], "and none was given: give it with --adapter"),
        ("with", ["--adapter", other], "and this one is"),
        ("without", ["--adapter", other], "drawn without an adapter"),
        ("with", ["--adapter", "nowhere"], "nowhere is no adapter"),
    ):
        assert run(["replay", f"{picture}/moon-1.png", *given, *model]) == 2
        captured = capsys.readouterr().err
        assert captured.startswith("error: ")
        assert captured.count("\n") == 1
        assert message in captured
