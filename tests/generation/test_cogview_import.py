"""CogView's published files: read without running them, checked key by key, converted with one copy in memory."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from PIL import Image

from data.text import TextError, TextTokenizer
from generation.cogview.importing import find_checkpoint, generator_config, import_generator
from generation.cogview.rows import parse_query
from generation.cogview.sampler import caption_scores, fill_sequence
from generation.drawing.sampling import SamplingOptions
from generation.rows.describe import caption_prompt_row
from generation.transformer.model import Transformer
from mmwudao.cli.app import run
from mmwudao.pipeline import load
from mmwudao.tasks import encode_pictures
from vqvae.cogview import import_tokenizer
from vqvae.storage.parts import ModelError, content_hash, load_part
from vqvae.storage.published import read_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "cogview"
TOKENIZER = GOLDEN / "vqvae" / "vqvae.pt"
CHECKPOINTS = GOLDEN / "transformer"
CAPTIONS = ["red heart", "a red apple", "the quick brown fox jumps over the lazy dog", "0123456789", "sleeping face"]
HASHES = {"tokenizer_hash": "t", "text_hash": "x"}
SIZES: dict[str, Any] = {"num_image_codes": 64, "num_text_pieces": 100, "heads": 4, **HASHES}


class Malicious:
    """Pickled, this is a program that makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def weights(name: str = "ckpt") -> dict:
    return read_checkpoint(find_checkpoint(CHECKPOINTS / name))["module"]


def checkpoint_folder(folder: Path, content: object) -> Path:
    """A published checkpoint folder with this content."""
    (folder / "7").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    torch.save(content, folder / "7" / "mp_rank_00_model_states.pt")
    return folder


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece model without byte pieces, as CogView's has none; at most 100 pieces."""
    prefix = tmp_path_factory.mktemp("text") / "cog"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_prefix=str(prefix),
        vocab_size=100, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


# reading


def test_a_training_checkpoint_gives_its_tensors():
    path = find_checkpoint(CHECKPOINTS / "ckpt_fp16_full")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    content = read_checkpoint(path)
    assert type(content["np_rng_state"][1]).__name__ == "_Ignored"
    assert content["module"].keys() == weights().keys()
    assert {tensor.dtype for tensor in content["module"].values()} == {torch.float16}


def test_arrays_of_older_numpy_are_ignored_too(tmp_path):
    """NumPy 1 calls the module numpy.core; published files are of its time."""
    old = tmp_path / "old.pt"
    new = find_checkpoint(CHECKPOINTS / "ckpt_fp16_full")
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            renamed = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            assert (renamed != data) == name.endswith("data.pkl")
            target.writestr(name, renamed)
    content = read_checkpoint(old)["module"]
    for key, tensor in weights("ckpt_fp16_full").items():
        assert torch.equal(content[key], tensor)


@pytest.mark.parametrize("place", ["beside the weights", "among the weights", "alone", "not in a zip file"])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, place):
    made = tmp_path / "made"
    bad = Malicious(made)
    path = tmp_path / "bad.pt"
    if place == "not in a zip file":
        path.write_bytes(pickle.dumps({"module": bad}))
    else:
        content = {"beside the weights": {"module": {}, "extra": bad}, "among the weights": {"module": {"w": bad}}}
        torch.save(content.get(place, bad), path)
    with pytest.raises(ModelError) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    if place != "not in a zip file":
        assert "is refused: it asks for posix.mkdir" in str(caught.value)
    assert not made.exists()
    torch.load(path, weights_only=False) if place != "not in a zip file" else pickle.loads(path.read_bytes())
    assert made.exists(), "the test's own pickle must work, or it tests nothing"


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, keep):
    data = TOKENIZER.read_bytes()
    (tmp_path / "short.pt").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ModelError, match="truncated"):
        import_tokenizer(tmp_path / "short.pt", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["short.pt"]


def test_what_is_no_dictionary_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pt")
    with pytest.raises(ModelError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "absent.pt")


# checking


def test_every_problem_of_the_weights_is_named(tmp_path):
    found = dict(weights())
    del found["transformer.layers.1.mlp.dense_h_to_4h.bias"]
    found["transformer.layers.0.attention.rotary.weight"] = torch.zeros(3)
    found["transformer.final_layernorm.weight"] = torch.zeros(63)
    found["transformer.final_layernorm.bias"] = "text"
    folder = checkpoint_folder(tmp_path / "bad", {"module": found})
    with pytest.raises(ModelError) as caught:
        import_generator(folder, tmp_path / "out", **SIZES)
    message = str(caught.value)
    assert "missing: transformer.layers.1.mlp.dense_h_to_4h.bias;" in message
    assert "unexpected: transformer.layers.0.attention.rotary.weight;" in message
    assert "not a tensor: transformer.final_layernorm.bias;" in message
    assert "of another shape: transformer.final_layernorm.weight [63] instead of [64]" in message
    assert not (tmp_path / "out").exists()


def test_a_key_of_the_tokenizer_is_checked_too(tmp_path):
    found = torch.load(TOKENIZER, weights_only=True)
    del found["module.dec.blocks.2.bias"]
    torch.save(found, tmp_path / "bad.pt")
    with pytest.raises(ModelError, match=r"missing: dec\.blocks\.2\.bias$"):
        import_tokenizer(tmp_path / "bad.pt", tmp_path / "out")
    torch.save({"state": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ModelError, match="no CogView image tokenizer"):
        import_tokenizer(tmp_path / "other.pt", tmp_path / "out")


def test_tensors_of_two_types_are_refused(tmp_path):
    found = dict(weights())
    found["word_embeddings.weight"] = found["word_embeddings.weight"].half()
    folder = checkpoint_folder(tmp_path / "mixed", {"module": found})
    with pytest.raises(ModelError, match="float16, float32 instead of one"):
        import_generator(folder, tmp_path / "out", **SIZES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_text_pieces": 400}, "has 256 ids, but 64 image codes, 400 text pieces and 27 commands make 512"),
        ({"heads": 5}, "heads=5 must divide width=64"),
        ({"grid": (40, 40)}, "1089 positions are too few for 40x40 codes"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        import_generator(CHECKPOINTS / "ckpt", tmp_path / "out", **{**SIZES, **change})


def test_layers_are_counted_from_those_that_are_there(tmp_path, caplog):
    whole = dict(weights())
    without_last = {key: tensor for key, tensor in whole.items() if not key.startswith("transformer.layers.2.")}
    with_gap = {key: tensor for key, tensor in whole.items() if not key.startswith("transformer.layers.1.")}
    far = whole | {"transformer.layers.99999999.attention.dense.bias": torch.zeros(64)}
    farther = whole | {"transformer.layers.5000.attention.dense.bias": torch.zeros(64)}
    for number, (found, message) in enumerate(
        [
            (without_last, "it has 2 layers, and not the 3 as asked"),
            (with_gap, "transformer.layers.1 is missing, and 2 others are there"),
            (far, "unexpected: transformer.layers.99999999.attention.dense.bias"),
            (farther, "transformer.layers.3 is missing, and 4 others are there"),
        ]
    ):
        folder = checkpoint_folder(tmp_path / str(number), {"module": found})
        with pytest.raises(ModelError, match=message):
            import_generator(folder, tmp_path / "out", **SIZES, layers=3)
    import_generator(CHECKPOINTS / "ckpt", tmp_path / "whole", **SIZES, layers=3)
    assert "so whether" not in caplog.text
    import_generator(CHECKPOINTS / "ckpt", tmp_path / "unknown", **SIZES)
    assert "no published model is 64 wide, so whether its 3 layers are all is not known" in caplog.text


def test_published_models_have_all_their_layers():
    """Their sizes are known, so a lost layer is: no numbers are needed to see it."""
    found = {
        "word_embeddings.weight": torch.zeros(256, 2560),
        "transformer.position_embeddings.weight": torch.zeros(1089, 2560),
        **{f"transformer.layers.{layer}.attention.dense.bias": torch.zeros(1) for layer in range(47)},
    }
    sizes: dict[str, Any] = {"num_image_codes": 64, "num_text_pieces": 100}
    with pytest.raises(ModelError, match=r"has 47 layers, and not the 48 of the published models that are 2560 wide"):
        generator_config(found, Path("x.pt"), **sizes)
    assert generator_config(found, Path("x.pt"), **sizes, layers=47).depth == 47
    found["transformer.layers.47.attention.dense.bias"] = torch.zeros(1)
    assert generator_config(found, Path("x.pt"), **sizes).depth == 48


def test_checkpoint_folders(tmp_path):
    with pytest.raises(ModelError, match="no latest_checkpointed_iteration"):
        find_checkpoint(tmp_path)
    folder = checkpoint_folder(tmp_path / "c", {"weights": {}})
    assert find_checkpoint(folder).parent.name == "7"
    with pytest.raises(ModelError, match="no weights under the key 'module'"):
        import_generator(folder, tmp_path / "out", **SIZES)
    shutil.copy(folder / "7" / "mp_rank_00_model_states.pt", folder / "7" / "mp_rank_01_model_states.pt")
    with pytest.raises(ModelError, match="split into 2 parts"):
        find_checkpoint(folder)
    tracker = folder / "latest_checkpointed_iteration.txt"
    tracker.write_text("8")
    with pytest.raises(ModelError, match="8/mp_rank_00_model_states.pt is missing"):
        find_checkpoint(folder)
    tracker.write_text("../elsewhere")
    with pytest.raises(ModelError, match="must hold the name of a folder"):
        find_checkpoint(folder)


# converting


@pytest.mark.parametrize("name", ["ckpt", "ckpt_fp16_full"])
def test_the_written_part_has_the_hash_it_was_given(tmp_path, name):
    config, found = import_generator(CHECKPOINTS / name, tmp_path / "part", **SIZES)
    model = load_part(Transformer, tmp_path / "part")
    assert model.config == config
    assert content_hash(model) == found
    assert model.embed.weight.dtype == (torch.float16 if "fp16" in name else torch.float32)


def test_no_more_than_one_copy_of_the_weights_is_in_memory(tmp_path):
    """Peak memory of another process: 28 MB of weights may cost little more than their own pages."""
    layer = {
        "attention.query_key_value": (3072, 1024),
        "attention.dense": (1024, 1024),
        "mlp.dense_h_to_4h": (4096, 1024),
        "mlp.dense_4h_to_h": (1024, 4096),
        **{f"{norm}_layernorm": (1024,) for norm in ("input", "post_attention", "third", "fourth")},
    }
    found = {}
    for name, shape in layer.items():
        found[f"transformer.layers.0.{name}.weight"] = torch.ones(shape, dtype=torch.float16)
        found[f"transformer.layers.0.{name}.bias"] = torch.ones(shape[:1], dtype=torch.float16)
    for name in ("weight", "bias"):
        found[f"transformer.final_layernorm.{name}"] = torch.ones(1024, dtype=torch.float16)
    found["word_embeddings.weight"] = torch.ones(256, 1024, dtype=torch.float16)
    found["transformer.position_embeddings.weight"] = torch.ones(1089, 1024, dtype=torch.float16)
    folder = checkpoint_folder(tmp_path / "large", {"module": found})
    size = find_checkpoint(folder).stat().st_size
    script = (
        "import re, sys; from pathlib import Path; from generation.cogview.importing import import_generator\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024\n"
        "before = peak()\n"
        f"import_generator(Path(sys.argv[1]), Path(sys.argv[2]), **{SIZES | {'heads': 16}!r})\n"
        "print(peak() - before)"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    done = subprocess.run(
        [sys.executable, "-c", script, folder, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1.6 * size
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert abs(written - size) < 0.01 * size


def test_text_models_without_byte_pieces_must_be_asked_for(text_model):
    with pytest.raises(TextError, match="no byte pieces"):
        TextTokenizer(text_model)
    text = TextTokenizer(text_model, needs_bytes=False)
    plain = sentencepiece.SentencePieceProcessor(str(text_model))
    assert text.encode("red ＡＢ \ud800") == plain.encode("red ＡＢ \ufffd")
    assert pickle.loads(pickle.dumps(text)).encode("red 红") == text.encode("red 红")


# the command


def arguments(text_model: Path, out: Path, **changes: object) -> list[str]:
    options: dict[str, object] = {"tokenizer": TOKENIZER, "generator": CHECKPOINTS / "ckpt", "text-model": text_model}
    options.update({"out": out, "heads": 4, "image-size": 64, **changes})
    return ["import", "cogview", *(str(part) for key, value in options.items() for part in (f"--{key}", value))]


def test_the_command_makes_a_model_that_draws(text_model, tmp_path, capsys):
    out = tmp_path / "models" / "cogview"
    assert run(arguments(text_model, out, name="small")) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert sorted(path.name for path in out.parent.iterdir()) == ["cogview"]
    assert run(["info", str(out)]) == 0
    assert "small: 64 x 64 pixels" in capsys.readouterr().out
    pipeline = load(out, "cpu", "float32")
    vocab = pipeline.generator.config.vocabulary
    row = parse_query("[ROI1] red apple [TINY] [BOI1] [MASK]*64", vocab, pipeline.text.encode)
    tokens = fill_sequence(pipeline.generator, row, SamplingOptions(top_k=1))
    assert pipeline.tokenizer.decode(tokens[:, -64:].view(-1, 8, 8)).shape == (1, 3, 64, 64)
    assert pipeline.tokenizer.quantizer.initialised  # type: ignore[union-attr]
    assert isinstance(pipeline.tokenizer.decoder.expand, torch.nn.Identity)
    assert pipeline.config.describes == "untagged"
    pictures = [Image.new("RGB", (80, 64), colour) for colour in ("red", "blue")]
    assert len(pipeline.caption(pictures)) == 2
    codes = encode_pictures(pipeline, pictures)
    rows = [caption_prompt_row(vocab, one, pipeline.text.encode("red apple")) for one in codes]
    expected = caption_scores(pipeline.generator, torch.tensor(rows))
    torch.testing.assert_close(torch.tensor(pipeline.rerank("red apple", pictures)), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "absent.pt"}, "no checkpoint at absent.pt"),
        ({"generator": GOLDEN}, "no latest_checkpointed_iteration"),
        ({"text-model": TOKENIZER}, "damaged or no SentencePiece model"),
        ({"image-size": 60}, "multiple of 8"),
    ],
)
def test_a_failed_import_leaves_nothing(text_model, tmp_path, capsys, changes, message):
    assert run(arguments(text_model, tmp_path / "out", **changes)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_heads_of_an_unpublished_width_must_be_said(tmp_path):
    found = {
        "word_embeddings.weight": torch.zeros(256, 48),
        "transformer.position_embeddings.weight": torch.zeros(1089, 48),
    }
    folder = checkpoint_folder(tmp_path / "narrow", {"module": found})
    with pytest.raises(ModelError, match="--heads"):
        import_generator(folder, tmp_path / "out", **{**SIZES, "heads": None})
