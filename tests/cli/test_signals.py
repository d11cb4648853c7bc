"""Ctrl-C and SIGTERM in every long command: one line, the shells' exit code, no process and no half-written file left.

A terminal sends Ctrl-C to all processes of a command, a supervisor SIGTERM to the first.
"""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data.sample import Caption, Sample
from data.shards import Manifest, ShardWriter, write_manifest
from mmwudao.cli.app import TERMINATED, run
from tests.helpers.cli import one_error

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "data" / "samples" / "emoji"
COMMAND = [sys.executable, "-m", "mmwudao"]
COUNT = 1500  # pictures: more than any of these commands takes in the seconds that a test waits


def _begun(out: Path) -> bool:
    return out.exists() or any(out.parent.glob(f".{out.name}.part-*"))


def _embedding(out: Path) -> bool:
    """`index build` of shards embeds them into a temporary folder first."""
    return any(out.parent.glob("temporary/mmwudao-vectors-*/settings.json"))


# arguments, when the signal is sent, and what a command that goes on later may leave
LONG: dict[str, tuple[str, Callable[[Path], bool], set[str]]] = {
    "embed": ("embed SHARDS -o OUT", _begun, {"settings.json"}),
    "index build SHARDS": ("index build SHARDS --collection OUT", _embedding, set()),
    "index build FOLDER": ("index build PHOTOS --collection OUT", _begun, set()),
    "tokenize": ("tokenize SHARDS -o OUT --size 128", _begun, set()),
    "eval retrieval": ("eval retrieval emoji SHARDS -o OUT", _begun, set()),
    "data clean": ("data clean SHARDS -o OUT", _begun, {"settings.json"}),
    "train tokenizer": (
        "train tokenizer CONFIGS/emoji-tokenizer.yaml data.shards=SAMPLES loop.out=OUT loop.minutes=5", _begun,
        {"config.yaml", "log.jsonl", "lease-000001.json", "latest", "run.json", ".metadata", "__0_0.distcp"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Noise, which no encoder makes small: as shards and as a folder of files."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "photos").mkdir()
    with ShardWriter(folder / "shards", "test-family", 500) as writer:
        for number in range(COUNT):
            buffer = io.BytesIO()
            Image.effect_noise((160, 160), 60).convert("RGB").save(buffer, "JPEG")
            (folder / "photos" / f"{number}.jpg").write_bytes(buffer.getvalue())
            caption = {"en": Caption(f"thing number {number}")}
            name = str(number)
            writer.write(Sample(name, buffer.getvalue(), "jpg", caption, family="a", concept=name, base_concept=name))
    write_manifest(folder / "shards", Manifest("noise", None, {"test-family": writer.shards}))
    return {
        "SHARDS": str(folder / "shards"), "PHOTOS": str(folder / "photos"), "SAMPLES": str(SAMPLES),
        "CONFIGS": str(ROOT / "mmwudao" / "configs"),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LONG))
@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, TERMINATED, "terminated")]
)
def test_a_signal_ends_a_long_command(inputs, tmp_path, name, number, code, said):
    line, begun, may_stay = LONG[name]
    out = tmp_path / "out"
    (tmp_path / "temporary").mkdir()
    arguments = [inputs.get(word, word) for word in line.replace("OUT", str(out)).split()]
    arguments = [re.sub("SAMPLES|CONFIGS", lambda found: inputs[found[0]], word) for word in arguments]
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
    )  # fmt: skip
    assert process.stderr is not None
    late = time.monotonic() + 240
    while not begun(out):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < late
        time.sleep(0.05)
    if name != "data clean":  # which leaves what tells that it has begun when its first shard is judged
        time.sleep(2)  # into the work
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    error = process.stderr.read().decode()
    assert process.wait(60) == code, error
    assert error.splitlines()[-1] == said
    assert "Traceback" not in error
    with pytest.raises(ProcessLookupError):  # no other process of the command is left
        os.killpg(process.pid, 0)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file() and "torchinductor" not in str(path)}
    assert left <= may_stay | {path.name for kind in ("events.*", "judged-*") for path in out.rglob(kind)}
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("retrieval", "retrieval.evaluation.evaluate.evaluate"),
        ("generator", "mmwudao.evaluation.evaluate_generator"),
    ],
)
def test_an_evaluation_that_fails_leaves_no_folder(kind, place, tmp_path, monkeypatch, capsys):
    out = tmp_path / "made" / "out"

    def fail(*_: object, **__: object) -> None:
        assert out.is_dir(), "it is made before the work, which would be lost on a disk that cannot be written"
        raise ValueError("no picture can be read")

    monkeypatch.setattr(place, fail)
    assert run(["eval", kind, "emoji", str(SAMPLES), "--split", "test-family", "-o", str(out)]) == 2
    assert "no picture can be read" in one_error(capsys)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("plain", [False, True])
def test_no_color_is_heard(plain):
    """https://no-color.org: of the escapes of a terminal only bold and dim stay."""
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color"} | ({"NO_COLOR": "1"} if plain else {})
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*COMMAND, "--help"], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            part = b""
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait() == 0
    coloured = re.findall(rb"\x1b\[[0-9;]*[34][0-9]m", shown)
    assert (coloured == []) == plain
