"""Texts and settings as editors of all systems store them: with a byte order mark, in UTF-16."""

from __future__ import annotations

import json

import pytest

from data.config import ConfigError
from retrieval.towers.foreign import read_json_object
from retrieval.training.train_text_encoder import read_texts
from vqvae.storage.parts import ModelError

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_texts_to_learn(tmp_path, encoding):
    file = tmp_path / "texts.txt"
    file.write_bytes("a red ball\r\n红色\r\na red ball\r\n".encode(encoding))
    assert read_texts([str(file)]) == ["a red ball", "红色"]


def test_texts_of_another_encoding_are_refused(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_bytes("红色的球\n".encode("gbk"))
    with pytest.raises(ConfigError, match="cannot be read as lines of text in UTF-8"):
        read_texts([str(file)])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_settings_of_published_models(tmp_path, encoding):
    file = tmp_path / "config.json"
    file.write_bytes(json.dumps({"hidden_size": 8, "name": "模型"}, ensure_ascii=False).encode(encoding))
    assert read_json_object(file) == {"hidden_size": 8, "name": "模型"}


def test_settings_that_are_no_text_are_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(b'{"name": "\xff\xff\xff"}')
    with pytest.raises(ModelError, match="missing or not a JSON object"):
        read_json_object(file)
