"""Towers in the layout of transformers from the command line and over HTTP: vectors, an index, search, candidates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmwudao.cli.app import run
from mmwudao.service.queues import Served
from retrieval.towers.base import load_towers
from retrieval.vectors.onnx_export import export_onnx
from tests.helpers.http import CLIENT
from tests.helpers.hub_folders import write_hub_folder
from tests.helpers.service_server import data_uri, png, running
from tests.helpers.tiny_towers import COLOURS, write_shards
from vqvae.storage.parts import ModelError


@pytest.fixture(scope="module", params=["siglip2", "chinese_clip"])
def towers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One kind that packs patches of any number, one that takes squares and hides its padding."""
    place = tmp_path_factory.mktemp(request.param)
    write_hub_folder(place / "hub", request.param)
    assert run(["import", "transformers", str(place / "hub"), "-o", str(place / "towers")]) == 0
    return place / "towers"


def test_vectors_an_index_and_search(towers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "shards", families=("a",))
    model, shards = ["--model", str(towers)], str(tmp_path / "shards")
    assert run(["embed", shards, "-o", str(tmp_path / "vectors"), *model, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["texts"]) == (len(COLOURS), 2 * len(COLOURS))
    collection = str(tmp_path / "collection")
    assert run(["index", "build", shards, "--collection", collection, *model]) == 0
    capsys.readouterr()
    assert run(["search", collection, "red square", "-k", "3", *model, "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert run(["eval", "retrieval", str(towers), shards, "--split", "train"]) == 0


def test_candidates_are_judged(towers: Path, tiny_model_dir: Path, tmp_path: Path, capsys) -> None:
    parts = [
        "--tokenizer", str(tiny_model_dir / "tokenizer"), "--generator", str(tiny_model_dir / "generator"),
        "--text", str(tiny_model_dir / "text.model"), "--towers", str(towers),
    ]  # fmt: skip
    model = str(tmp_path / "model")
    assert run(["assemble", *parts, "--name", "judged", "--image-size", "32", "-o", model]) == 0
    capsys.readouterr()
    out = tmp_path / "pictures"
    drawn = ["generate", "red square", "--model", model, "--candidates", "3", "--rerank", "towers", "-o", str(out)]
    assert run(drawn) == 0
    assert len(list(out.glob("*.png"))) >= 1
    assert run(["rerank", "red square", *map(str, out.glob("*.png")), "--model", model, "--by", "towers"]) == 0


def test_over_http(towers: Path) -> None:
    loaded = load_towers(towers)
    with running(Served("hub", loaded, None, None)) as address:
        answer = CLIENT.post(f"{address}/v1/embeddings", json={"input": ["red square", data_uri(png())]}).json()
    text, picture = (torch.tensor(row["embedding"]) for row in answer["data"])
    torch.testing.assert_close(text, loaded.encode_text(["red square"])[0], atol=1e-5, rtol=0)
    assert picture.shape == (loaded.embed_dim,)
    assert answer["usage"]["prompt_tokens"] > 0


def test_onnx(towers: Path, tmp_path: Path) -> None:
    loaded: Any = load_towers(towers)
    if loaded.config["model_type"] == "siglip2":  # the shape of its grid is among the numbers of its input
        with pytest.raises(ModelError, match="the image tower cannot be exported to ONNX"):
            export_onnx(loaded, tmp_path / "onnx")
        assert not (tmp_path / "onnx").exists()
        return
    files = export_onnx(loaded, tmp_path / "onnx")
    assert [file.file for file in files] == ["image.onnx", "text.onnx"]
    assert max(file.difference for file in files) < 1e-4
