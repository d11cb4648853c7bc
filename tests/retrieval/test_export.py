"""Towers in onnxruntime: the features of PyTorch at batch sizes that the export did not see."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from data.sample import DataError
from data.text import TextTokenizer
from retrieval.vectors import onnx_export as export
from retrieval.vectors.onnx_export import export_onnx
from tests.conftest import CAPTIONS
from tests.helpers.tiny_towers import ColourTowers, tiny_towers
from vqvae.storage.parts import ModelError


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("onnx") / "towers"
    return out, export_onnx(tiny_towers(), out, int8=True)


def test_files(exported):
    out, files = exported
    assert [entry.file for entry in files] == ["image.onnx", "image.int8.onnx", "text.onnx", "text.int8.onnx"]
    assert {path.name for path in out.iterdir()} == {*(entry.file for entry in files), "text.model", "towers.json"}
    record = json.loads((out / "towers.json").read_text())
    assert record["embed_dim"] == 32
    assert record["files"][0]["bytes"] == (out / "image.onnx").stat().st_size
    for entry in files:
        assert entry.difference <= 1e-4 or "int8" in entry.file
        assert entry.least_cosine > (0.9 if "int8" in entry.file else 0.99999)
        assert entry.least_cosine <= entry.cosine


@pytest.mark.parametrize("batch", [1, 7])
def test_parity_in_onnxruntime(exported, batch):
    """Other inputs than the export compared with, and one text alone, which makes shorter rows."""
    towers = tiny_towers()
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(batch)]
    pixels = torch.stack([towers.preprocess(picture) for picture in pictures])
    session = onnxruntime.InferenceSession(exported[0] / "image.onnx")
    found = session.run(["features"], {"pixels": pixels.numpy()})[0]
    assert np.abs(found - towers.encode_image(pictures).numpy()).max() <= 1e-4
    texts = CAPTIONS[5 : 5 + batch]
    session = onnxruntime.InferenceSession(exported[0] / "text.onnx")
    found = session.run(["features"], {"tokens": towers.tokenize(texts).numpy()})[0]
    assert np.abs(found - towers.encode_text(texts).numpy()).max() <= 1e-4


def test_the_exported_folder_tokenizes_alike(exported):
    text = TextTokenizer(exported[0] / "text.model")
    assert text.content_hash == tiny_towers().text_tokenizer.content_hash


def test_towers_that_differ_are_not_exported(exported, tmp_path, monkeypatch):
    # the files that were exported before: another export takes seconds
    monkeypatch.setattr(export, "_export", lambda module, inputs, path: shutil.copyfile(exported[0] / path.name, path))
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ModelError, match="the image tower differs by .* in onnxruntime: not exported"):
        export_onnx(tiny_towers(), tmp_path / "out")
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        export_onnx(ColourTowers(), tmp_path)


def test_a_very_long_text_is_cut_with_a_notice(caplog):
    """Here because the towers are: 100,000 characters take no longer than reading them once."""
    import time

    towers, text = tiny_towers(), "一个红色的苹果 " * 12_500
    started = time.process_time()
    features = towers.encode_text([text])
    assert time.process_time() - started < 10
    assert torch.equal(features, towers.encode_text([text[:1000]]))
    assert "is cut to 16" in caplog.text
