"""Loading and saving model directories: `mmwudao.pipeline.load`, `mmwudao.loading`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.sample import DataError
from generation.drawing.sampling import SamplingOptions
from mmwudao import load
from mmwudao.loading.devices import choose_dtype
from mmwudao.loading.info import describe_model
from mmwudao.loading.model_dir import assemble_model, copy_model, find_model, load_tokenizer, read_model_config
from mmwudao.pipeline import Pipeline
from vqvae.storage.parts import ModelError


@pytest.fixture(scope="module")
def pipe(tiny_model_dir: Path) -> Pipeline:
    return load(tiny_model_dir, device="cpu", dtype="float32")


def pixels(image: Image.Image) -> bytes:
    return image.tobytes()


# loading


def test_unknown_and_absent_devices_and_dtypes(tiny_model_dir: Path) -> None:
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        load(tiny_model_dir, device="tpu")
    with pytest.raises(ValueError, match="unknown dtype 'int4'"):
        load(tiny_model_dir, dtype="int4")
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"finds no {absent} device"):
        load(tiny_model_dir, device=absent)


def test_dtypes(tiny_model_dir: Path) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        pipe = load(tiny_model_dir, device="cpu", dtype=dtype)
        assert pipe.dtype == dtype
        assert pipe.generate("cat", seed=0)[0].info["dtype"] == dtype


@pytest.mark.parametrize(
    ("amx", "avx", "expected"),
    [(True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32)],
)
def test_auto_dtype_follows_the_cpu(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    assert choose_dtype("auto", torch.device("cpu")) == expected
    assert choose_dtype("auto", torch.device("mps")) == torch.float32


@pytest.fixture
def broken(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the model to break."""
    return copy_model(tiny_model_dir, tmp_path / "broken")


@pytest.mark.parametrize(
    "file",
    [
        *("config.json", "text.model", "tokenizer/config.json", "tokenizer/model.safetensors"),
        *("generator/config.json", "generator/model.safetensors"),
    ],
)
@pytest.mark.parametrize("how", ["missing", "truncated", "changed"])
def test_a_damaged_model_is_refused(broken: Path, file: str, how: str) -> None:
    path = broken / file
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif path.suffix == ".json":
        path.write_text("{}")
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=re.escape(str(broken))) as caught:
        load(broken, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_missing_part_folder_is_named(broken: Path) -> None:
    shutil.rmtree(broken / "generator")
    with pytest.raises(ModelError, match="generator is missing|generator .* is missing"):
        load(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other/9"}, "format"),
        ({"parts": {}}, "names no tokenizer"),
        ({"colour": "red"}, "unknown key colour"),
        ({"image_size": "large"}, "image_size"),
        ({"image_size": 33}, "image_size must be a multiple of 8"),
        ({"default_sampling": {"temperature": -1}}, "temperature"),
        ({"default_sampling": {"heat": 1}}, "heat"),
    ],
)
def test_a_wrong_config_is_named(broken: Path, change: dict[str, object], message: str) -> None:
    record = json.loads((broken / "config.json").read_text()) | change
    (broken / "config.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match=message) as caught:
        load(broken)
    assert "\n" not in str(caught.value)


def test_parts_stay_inside_the_model_directory(broken: Path) -> None:
    record = json.loads((broken / "config.json").read_text())
    record["parts"]["text"]["path"] = "../../text.model"
    (broken / "config.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="inside the model directory"):
        load(broken)


def test_a_generator_refuses_another_tokenizer(broken: Path, other_model_dir: Path) -> None:
    shutil.rmtree(broken / "tokenizer")
    shutil.copytree(other_model_dir / "tokenizer", broken / "tokenizer")
    with pytest.raises(ModelError, match="tokenizer is not the one config.json names"):
        load(broken)
    # nor does a config.json that was rewritten to match help: the generator remembers
    record = json.loads((broken / "config.json").read_text())
    record["parts"]["tokenizer"] = json.loads((other_model_dir / "config.json").read_text())["parts"]["tokenizer"]
    (broken / "config.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="the generator was trained with the image tokenizer"):
        load(broken)


def test_find_model(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(str(tiny_model_dir)) == tiny_model_dir
    for name in ("no-such-model", "./no/such/folder", "/no/such", ""):
        with pytest.raises(ModelError, match="give a shipped name"):
            find_model(name)


def test_a_hub_id_is_downloaded(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def snapshot_download(hub_id: str, **options: object) -> str:
        asked.append(hub_id)
        return str(tiny_model_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load("someone/tiny", device="cpu").source == "someone/tiny"
    assert asked == ["someone/tiny"]


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(hub_id: str, **options: object) -> str:
        raise ConnectionError("cannot reach the hub\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match="cannot reach the hub$"):
        load("someone/tiny")


# model directories


def test_save_copies_the_model(pipe: Pipeline, tmp_path: Path) -> None:
    saved = pipe.save(tmp_path / "copy")
    again = load(saved, device="cpu", dtype="float32")
    assert again.config == pipe.config
    assert pixels(again.generate("红心", seed=1)[0]) == pixels(pipe.generate("红心", seed=1)[0])
    with pytest.raises(DataError, match="not empty"):
        pipe.save(saved)


def test_a_generator_in_eight_bits(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = read_model_config(tiny_model_dir)

    def assembled(name: str, eight_bits: bool) -> Path:
        return assemble_model(
            tiny_model_dir / "tokenizer", tiny_model_dir / "generator", tiny_model_dir / "text.model", tmp_path / name,
            name=name, image_size=32, styles=config.styles, languages=config.languages,
            default_sampling=config.default_sampling, eight_bits=eight_bits,
        )  # fmt: skip

    plain, small = assembled("plain", False), assembled("small", True)
    sizes = [(folder / "generator" / "model.safetensors").stat().st_size for folder in (plain, small)]
    assert sizes[1] < 0.7 * sizes[0]
    hashes = [read_model_config(folder).parts["generator"].hash for folder in (plain, small)]
    assert hashes[0] != hashes[1]
    first = load(small, device="cpu", dtype="float32").generate("red heart", seed=1)[0]
    assert first.info["model_hash"] != load(plain, device="cpu").config.model_hash
    again = load(small, device="cpu", dtype="float32").generate("red heart", seed=1)[0]
    assert first.tobytes() == again.tobytes()


def test_assemble_refuses_parts_that_do_not_belong_together(
    tiny_model_dir: Path, other_model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="was trained with the image tokenizer"):
        assemble_model(
            other_model_dir / "tokenizer",
            tiny_model_dir / "generator",
            tiny_model_dir / "text.model",
            tmp_path / "mixed",
            name="mixed",
            image_size=32,
            styles=[],
            languages=["en"],
            default_sampling=SamplingOptions(),
        )
    assert list(tmp_path.iterdir()) == []


def test_describe(tiny_model_dir: Path) -> None:
    described = describe_model(tiny_model_dir)
    assert set(described["parts"]) == {"tokenizer", "generator", "text"}
    generator = described["parts"]["generator"]
    pipe = load(tiny_model_dir, "cpu")
    assert generator["parameters"] == sum(p.numel() for p in pipe.generator.parameters())
    assert generator["dtype"] == "bfloat16"
    assert described["bytes"] == sum(part["bytes"] for part in described["parts"].values())
    json.dumps(described)


def test_load_tokenizer_from_a_model_and_from_a_part(tiny_model_dir: Path) -> None:
    for source in (tiny_model_dir, tiny_model_dir / "tokenizer"):
        assert load_tokenizer(source).config.codebook_size == 32
