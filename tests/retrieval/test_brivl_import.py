"""Published weights of BriVL: imported by the command, or refused in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mmwudao.cli.app import run
from retrieval.towers.base import load_towers
from retrieval.towers.importing import import_brivl
from tests.helpers.brivl import GOLDEN, arrays, checkpoint, close, pictures, texts
from vqvae.storage.parts import ModelError


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "brivl.pth"
    torch.save(checkpoint(), path)
    return path


def command(source: Path, out: Path, *more: str) -> list[str]:
    text, config = str(GOLDEN / "hf_text"), str(GOLDEN / "cfg.yml")
    return ["import", "brivl", str(source), "--out", str(out), "--text-model", text, "--config", config, *more]


def test_the_command(published, tmp_path, capsys):
    assert run(command(published, tmp_path / "towers")) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'towers'}\n"
    towers = load_towers(tmp_path / "towers")
    close(towers.encode_text(texts()), arrays("expected_extract.npz")["text_feat"])
    assert towers.scale.item() == pytest.approx(1 / 0.07)
    assert load_towers(tmp_path / "towers", dtype="bfloat16").encode_image(pictures()).dtype == torch.float32


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "missing: imgencoder.learnable.imgFC.fc1.weight"),
        ("unexpected", "unexpected: imgencoder.learnable.more"),
        ("shape", "textencoder.learnable.textFC.fc1.bias [3] instead of [64]"),
        ("malicious", "is refused: it asks for posix.mkdir"),
        ("truncated", "truncated"),
        ("key", "no weights under the key 'learnable'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, capsys, kind, message):
    content: dict[str, Any] = checkpoint()
    weights = content["learnable"]
    if kind == "missing":
        del weights["imgencoder.learnable.imgFC.fc1.weight"]
    elif kind == "unexpected":
        weights["imgencoder.learnable.more"] = torch.zeros(1)
    elif kind == "shape":
        weights["textencoder.learnable.textFC.fc1.bias"] = torch.zeros(3)
    elif kind == "malicious":
        weights["imgencoder.more"] = Malicious(tmp_path / "made")
    elif kind == "key":
        content = {"model": weights}
    path = tmp_path / "brivl.pth"
    torch.save(content, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    assert run(command(path, tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["brivl.pth"]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("MODEL: [1", "not YAML with a section MODEL"),
        ("OTHER: 1", "not YAML with a section MODEL"),
        ("MODEL: {IMG_SIZE: big}", "does not describe BriVL: image_size"),
        ("MODEL: {MAX_TEXT_LEN: 24, CNN: no_such_net}", "no towers can be built .*Unknown model"),
        ("MODEL: {MAX_TEXT_LEN: 24, IMG_TRANSFORMER_HEAD: 5}", "no towers can be built from this configuration"),
        ("MODEL: {MAX_TEXT_LEN: 24, CNN: test_efficientnet}", "test_efficientnet gives 256 features, not 2048"),
        ("MODEL: {MAX_TEXT_LEN: 65}", "text_tokens=65 is above BERT's 64"),
    ],
)
def test_wrong_configurations(published, tmp_path, yaml, message):
    (tmp_path / "cfg.yml").write_text(yaml)
    with pytest.raises(ModelError, match=message):
        import_brivl(published, tmp_path / "out", text_model=GOLDEN / "hf_text", config=tmp_path / "cfg.yml")
    with pytest.raises(ModelError, match="no vocabulary at"):
        import_brivl(published, tmp_path / "out", text_model=tmp_path)
