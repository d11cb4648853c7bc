"""How commands stop: names of files that promise another format, signals, a reader that leaves, completion."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from mmwudao.cli.app import CLOSED_PIPE, TERMINATED, run
from mmwudao.pictures import encode_png, read_recipe
from tests.helpers.cli import one_error

COMMAND = [sys.executable, "-m", "mmwudao"]


@pytest.mark.parametrize("command", ["generate", "upscale", "complete", "tokenize"])
def test_a_folder_is_not_named_like_a_picture(command, tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    extra = {"complete": ["--prompt", "x"]}.get(command, [])
    given = "a red apple" if command == "generate" else str(tmp_path / "a.png")
    assert run([command, given, *extra, "-o", str(tmp_path / "out.png")]) == 2
    assert "names the folder" in one_error(capsys)
    assert not (tmp_path / "out.png").exists()


def recipe_png(path: Path, **changes: object) -> Path:
    image = Image.new("RGB", (8, 8))
    fields = {"prompt": "x", "text": "x", "seed": 1, "model": "emoji", "model_hash": "0" * 64, "tokenizer_hash": "0"}
    fields |= {"device": "cpu", "dtype": "float32", "version": "0"}
    for name, value in (fields | changes).items():
        image.info[name] = value
    path.write_bytes(encode_png(image))
    return path


@pytest.mark.parametrize("name", ["again.jpg", "again.webp", "again"])
def test_replay_writes_a_png_under_its_own_name_alone(name, tmp_path, capsys):
    picture = recipe_png(tmp_path / "a.png")
    assert run(["replay", str(picture), "-o", str(tmp_path / name)]) == 2
    assert "give a name that ends in .png" in one_error(capsys)


@pytest.mark.parametrize(
    "changes", [{"seed": -1}, {"seed": 2**63}, {"seed": "x"}, {"temperature": -3}, {"top_k": 2**40}]
)
def test_impossible_recipes_are_refused(changes, tmp_path):
    with pytest.raises(ValueError, match="holds a damaged recipe"):
        read_recipe(recipe_png(tmp_path / "a.png", **changes))


@pytest.mark.parametrize("prompt", ["", " \n", "\ufeff", "\u200b\u200d", "\u3164", "\ufe0f", "\u2800", "\x07"])
def test_a_prompt_of_nothing_visible_is_empty(prompt, tmp_path, capsys):
    assert run(["generate", prompt, "-o", str(tmp_path / "out")]) == 2
    assert "an empty prompt" in one_error(capsys)


def test_a_reader_that_leaves_is_no_error():
    command = [*COMMAND, "train", "tokenizer", "--fields"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error = process.stderr.read().decode()
    assert (process.wait(), error) == (CLOSED_PIPE, "")


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGTERM, TERMINATED, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_ends_a_command_and_leaves_nothing(number, code, said, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for k in range(1500):
        Image.new("RGB", (64, 64), (k % 256, k // 256, 0)).save(folder / f"{k}.bmp")
    command = [*COMMAND, "data", "pack", str(folder), "-o", str(tmp_path / "out"), "--uncaptioned", "--size", "512"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not list(tmp_path.glob(".out.part-*/*.tar")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.stderr is not None
    error = process.stderr.read().decode()
    assert (process.wait(), error.splitlines()[-1]) == (code, said)
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_shell_completion():
    environment = os.environ | {"_MMWUDAO_COMPLETE": "complete_bash", "COMP_WORDS": "mmwudao ge", "COMP_CWORD": "1"}
    program = "import sys; sys.argv = ['mmwudao']; from mmwudao.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert "generate" in done.stdout.split()
