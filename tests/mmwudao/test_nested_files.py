"""JSON of a hundred thousand brackets in the place of every file that a command reads: one line, never a traceback."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from data.framed_text import framed_text_file, load_model_text
from data.reading import SkipLog
from data.shard_index import ShuffledShards, index_path, open_index, scan_shard
from data.shards import read_manifest
from generation.transformer.adapters import read_adapter
from mmwudao.cli.app import run
from retrieval.encoders.importing import import_text_encoder
from retrieval.encoders.text_encoder import load_text_encoder, save_text_encoder
from retrieval.photos.places import OWN_FOLDER, RECORD, read_place
from retrieval.towers.base import save_towers
from retrieval.vectors.parquet import open_vectors
from tests.helpers.cli import one_error
from tests.helpers.tiny_encoders import tiny_text_encoder
from tests.helpers.tiny_towers import tiny_towers, write_shards
from vqvae.storage.folders import read_object
from vqvae.storage.weights_file import WeightsFile
from vqvae.tokenizers import load_image_tokenizer
from vqvae.training.stored import FACTS, StoredFolder

NESTED = b"[" * 100_000
OBJECT = b'{"a":' * 100_000


@pytest.mark.parametrize("content", [NESTED, OBJECT])
@pytest.mark.parametrize("name", ["config.json", "tokenizer/config.json", "generator/config.json"])
def test_a_model_folder(name: str, content: bytes, tiny_model_dir: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(content)
    assert run(["generate", "red heart", "--model", str(tmp_path / "model"), "-o", str(tmp_path / "out")]) == 2
    assert name in one_error(capsys)
    assert not (tmp_path / "out").exists()


def test_towers(tmp_path: Path, capsys) -> None:
    save_towers(tiny_towers(), tmp_path / "towers")
    (tmp_path / "towers" / "config.json").write_bytes(NESTED)
    shards = write_shards(tmp_path / "shards")
    assert run(["embed", str(shards), "--model", str(tmp_path / "towers"), "-o", str(tmp_path / "out")]) == 2
    assert "config.json" in one_error(capsys)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_text_encoders(name: str, tmp_path: Path) -> None:
    save_text_encoder(tiny_text_encoder(), tmp_path / "encoder")
    (tmp_path / "encoder" / name).write_bytes(NESTED)
    with pytest.raises(ValueError, match=r"(?s)^[^\n]+$"):
        load_text_encoder(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"(?s)^[^\n]+$"):
        import_text_encoder(tmp_path / "encoder", tmp_path / "out")


READERS: dict[str, Callable[[Path], object]] = {
    "manifest.json": read_manifest,
    "settings.json": open_vectors,
    FACTS: StoredFolder,
    "object.json": lambda folder: read_object(folder / "object.json"),
    "text.json": lambda folder: load_model_text(folder / "text.json"),
    "tokenizer.json": lambda folder: framed_text_file(folder / "tokenizer.json", "{prompt}", 10),
    "header.safetensors": lambda folder: WeightsFile(folder / "header.safetensors"),
    RECORD: lambda folder: read_place(folder.parent),
}


@pytest.mark.parametrize("content", [NESTED, OBJECT])
@pytest.mark.parametrize("name", list(READERS))
def test_files_by_their_readers(name: str, content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / OWN_FOLDER
    folder.mkdir()
    head = struct.pack("<Q", len(content)) if name.endswith("safetensors") else b""
    (folder / name).write_bytes(head + content)
    with pytest.raises(ValueError, match=r"(?s)^[^\n]+$"):
        READERS[name](folder)


def test_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(NESTED)
    (tmp_path / "adapter.safetensors").touch()
    with pytest.raises(ValueError, match="config.json is not JSON: .* nested"):
        read_adapter(tmp_path)


def test_an_image_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(NESTED)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="config.json is damaged"):
        load_image_tokenizer(tmp_path)


def test_a_damaged_index_of_a_shard_is_made_again(tmp_path: Path) -> None:
    shard = next(write_shards(tmp_path / "shards").glob("*.tar"))
    count = open_index(shard, SkipLog())
    head, *lines = index_path(shard).read_text().splitlines()
    for body in (NESTED.decode(), lines[0][:20], ""):
        index_path(shard).write_text("\n".join([head, body]))
        shards = ShuffledShards([shard])
        assert [shards.entries(0)[number].key for number in range(count)] == [e.key for e in scan_shard(shard)[0]]
