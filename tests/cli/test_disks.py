"""A full disk: one line, exit code 2, nothing half-written. A limit on the size of files stands for it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from retrieval.encoders.text_encoder import save_text_encoder
from tests.helpers.tiny_encoders import tiny_text_encoder

SHARDS = str(Path(__file__).parents[2] / "data" / "samples" / "emoji")
COMMANDS = {
    "generate": ["generate", "a red apple", "-n", "1", "--seed", "0", "-o", "out"],
    "tokenize": ["tokenize", SHARDS, "-o", "out"],
    "embed": ["embed", SHARDS, "-o", "out"],
    "import": ["import", "text-encoder", "teacher", "-o", "out"],
    "export": ["export", "onnx", "emoji", "-o", "out"],
}


def small_files_only():
    """In the child: no file may grow above 4 KiB, and the signal that would kill the process is an error instead."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line(name, tmp_path):
    save_text_encoder(tiny_text_encoder(), tmp_path / "teacher")
    done = subprocess.run(
        [sys.executable, "-m", "mmwudao", *COMMANDS[name]], cwd=tmp_path, preexec_fn=small_files_only,
        capture_output=True, text=True, check=False, env=os.environ | {"NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".out")]
