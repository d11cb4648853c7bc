"""The command line: exit codes, one line an error, nothing half-written, and what is printed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from data import atomic
from mmwudao import pictures
from mmwudao.cli import output
from mmwudao.cli.app import run
from mmwudao.loading.devices import choose_threads
from mmwudao.loading.model_dir import copy_model
from mmwudao.pictures import read_recipe
from tests.helpers.cli import one_error

HEAVY = ("torch", "torchvision", "numpy", "PIL", "vqvae", "huggingface_hub", "yaml", "lancedb")
# seconds to import, all of them, and PyTorch's compiler behind some
NOT_TO_DRAW = ("timm", "torchvision", "transformers", "open_clip", "scipy", "pandas", "pyarrow", "torch._dynamo")
COMMANDS = [
    [],
    ["generate"],
    ["replay"],
    ["caption"],
    ["rerank"],
    ["complete"],
    ["info"],
    ["upscale"],
    ["tokenize"],
    ["assemble"],
    ["train"],
    ["train", "tokenizer"],
    ["train", "generator"],
    ["train", "style"],
    ["train", "upscaler"],
    ["data"],
    ["data", "build"],
    ["data", "build", "emoji"],
    ["data", "pack"],
    ["data", "stats"],
    ["import"],
    ["import", "cogview"],
    ["index"],
    ["index", "build"],
    ["search"],
    ["demo"],
]


@pytest.fixture
def generate(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs `generate` with the tiny model in this process, into tmp_path/out."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, out: str = "out") -> int:
        return run(["generate", "--model", str(tiny_model_dir), "--device", "cpu", "-o", out, *arguments])

    return call


# help


def test_nothing_is_imported_that_is_not_needed() -> None:
    """In one process for all commands: how long an answer takes depends on the machine, what it imports does not."""
    script = (
        "import json, sys; import mmwudao\n"
        "def found(names): return sorted(set(names) & set(sys.modules))\n"
        f"heavy = [found({HEAVY!r})]\n"
        "from mmwudao.cli.app import run\n"
        "codes = [run([*command, '--help']) for command in json.loads(sys.argv[1])]\n"
        f"heavy += found({HEAVY!r})\n"
        "from PIL import Image\n"
        "towers = mmwudao.load('emoji', device='cpu').towers  # what `generate` loads, draws from and judges by\n"
        "vectors = towers.encode_text(['an apple']) @ towers.encode_image([Image.new('RGB', (96, 96))]).T\n"
        f"print(codes, heavy, found({NOT_TO_DRAW!r}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(COMMANDS)], capture_output=True, text=True, encoding="utf-8"
    )
    assert done.stderr.strip() == f"{[0] * len(COMMANDS)} [[]] []"
    assert done.stdout.count("Usage") == len(COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mmwudao 0.")


def test_a_group_without_a_command_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data"]) == 2
    captured = capsys.readouterr()
    assert "stats" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paint"], "No such command 'paint'"),
        (["generate", "a", "--colour", "red"], "--colour"),
        (["generate", "a", "-n", "two"], "-n"),
        (["replay"], "picture"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert message in one_error(capsys)


# generate


def test_generate_writes_pictures_and_a_sheet(generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("红心", "a red apple", "-n", "2", "--seed", "3", "--style", "noto") == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["红心-3.png", "红心-4.png", "a-red-apple-5.png", "a-red-apple-6.png"]
    assert lines == [*(f"out/{name}" for name in names), "sheet: out/grid.png"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*names, "grid.png"])
    assert Image.open("out/grid.png").size == (2 * 36 + 4, 2 * 36 + 4)
    assert read_recipe(Path("out/a-red-apple-6.png"))["prompt"] == "a red apple"


def test_generate_never_overwrites(generate, tmp_path: Path) -> None:
    for _ in range(2):
        assert generate("cat", "--seed", "3") == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["cat-3-2.png", "cat-3.png", "grid-2.png", "grid.png"]
    assert Path("out/cat-3.png").read_bytes() == Path("out/cat-3-2.png").read_bytes()


def test_generate_json_is_one_object_a_picture(generate, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("😀", "cat", "--json", "--top-k", "7", "--temperature", "0.5") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == ["😀", "cat"]
    for record in records:
        assert Path(record["path"]).is_file()
        assert (record["top_k"], record["temperature"], record["grid"]) == (7, 0.5, "out/grid.png")


def test_prompts_file(generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeff红心\r\n\n  a cat \n".encode())
    assert generate("first", "--prompts-file", "prompts.txt", "--json", "--seed", "0") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(record["prompt"], record["seed"]) for record in records] == [("first", 0), ("红心", 1), ("a cat", 2)]


def test_preview_grows_and_stays(generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    previews: list[bytes] = []
    write = atomic.write_files

    def spy(files: dict[Path, bytes]) -> None:
        previews.extend(data for path, data in files.items() if path.name == "preview.png")
        write(files)

    monkeypatch.setattr(atomic, "write_files", spy)
    assert generate("cat", "--preview", "--seed", "0") == 0
    assert len(previews) == 3  # at the start, and after each two of the four rows of codes
    assert len(set(previews)) == 3
    assert Path("out/preview.png").read_bytes() == previews[-1] == Path("out/grid.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt"),
        ([""], "empty prompt"),
        (["  \n "], "empty prompt"),
        (["a", " "], "empty prompt"),
        (["字" * 10_000], "10000 characters: at most 1000"),
        (["a", "-n", "0"], "at least 1"),
        (["a", "-n", "1000000"], "at most 1000"),
        (["a", "--style", "cubism"], "unknown style 'cubism'"),
        (["a", "--device", "tpu"], "unknown device 'tpu'"),
        (["a", "--dtype", "int4"], "unknown dtype 'int4'"),
        (["a", "--seed", "-1"], "seed"),
        (["a", "--temperature", "nan"], "temperature"),
        (["a", "--top-p", "2"], "top_p"),
        (["a", "--model", "no-such-model"], "no model 'no-such-model'"),
        (["--prompts-file", "absent.txt"], "absent.txt"),
        (["--prompts-file", "empty.txt"], "holds no prompt"),
        (["--prompts-file", "latin.txt"], "not UTF-8"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    generate, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    assert generate(*arguments, "--preview") == 2
    assert message in one_error(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["missing", "truncated"])
@pytest.mark.parametrize("file", ["generator/model.safetensors", "tokenizer/config.json", "text.model", "config.json"])
def test_a_damaged_model_is_one_line(
    tiny_model_dir: Path, tmp_path: Path, file: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = copy_model(tiny_model_dir, tmp_path / "model")
    data = (broken / file).read_bytes()
    (broken / file).unlink()
    if how == "truncated":
        (broken / file).write_bytes(data[: len(data) // 2])
    for command in (["generate", "a", "--model", str(broken), "-o", str(tmp_path / "out")], ["info", str(broken)]):
        assert run(command) == 2
        assert str(broken) in one_error(capsys)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file(generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("here first")
    for out in ("file", "file/below"):
        assert generate("a", out=out) == 2
        assert "file" in one_error(capsys)
    assert (tmp_path / "file").read_text() == "here first"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_folder(generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    assert generate("a") == 2
    assert "Permission denied: " in one_error(capsys)


def test_a_disk_that_is_read_only_or_full(
    generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(path))

    def read_only(**options: object) -> None:
        raise OSError(30, "Read-only file system", "out")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert generate("a") == 2
    assert "No space left on device: out" in one_error(capsys)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(output.tempfile, "TemporaryFile", read_only)
    assert generate("a") == 2
    assert "Read-only file system: out" in one_error(capsys)
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_older_pictures_alone(generate, tmp_path: Path) -> None:
    assert generate("cat", "--seed", "1") == 0
    assert generate("cat", "--style", "cubism") == 2
    assert sorted(os.listdir(tmp_path / "out")) == ["cat-1.png", "grid.png"]


def test_ctrl_c_in_the_middle_of_drawing(
    generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, calls = atomic.write_files, []

    def interrupted(files: dict[Path, bytes]) -> None:
        calls.append(files)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(files)

    monkeypatch.setattr(atomic, "write_files", interrupted)
    assert generate("cat", "--preview") == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "interrupted\n")
    assert not (tmp_path / "out").exists()


def test_sigint_ends_the_process_with_130(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["generate", "cat", "-n", "1000", "--model", str(tiny_model_dir), "--preview", "-o", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmwudao", *command], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not (out / "preview.png").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert not out.exists()


def test_output_is_utf8_in_any_locale(tiny_model_dir: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = ["generate", "红心", "--seed", "1", "--json", "--model", str(tiny_model_dir), "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "mmwudao", *command], capture_output=True, text=True, encoding="utf-8", env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == "红心"


# replay


@pytest.fixture
def picture(generate, capsys: pytest.CaptureFixture[str]) -> Path:
    assert generate("戴墨镜的笑脸", "-n", "3", "--seed", "5", "--guidance", "1.5") == 0
    capsys.readouterr()
    return Path("out/戴墨镜的笑脸-6.png")


def test_replay_draws_the_identical_picture(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", str(picture)]) == 0
    dtype = read_recipe(picture)["dtype"]
    assert capsys.readouterr().out.splitlines() == [
        "out/戴墨镜的笑脸-6-replay.png",
        f"identical to the original (cpu, {dtype})",
    ]
    assert run(["replay", str(picture), "-o", "again.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": "again.png", "differing_pixels": 0, "pixels": 1024}
    assert Path("again.png").read_bytes() == picture.read_bytes()


def test_replay_says_when_pixels_differ(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = read_recipe(picture)
    with Image.open(picture) as original:
        changed = original.copy()
    red, *others = changed.tobytes()[:3]
    changed.putpixel((0, 0), (255 - red, *others))
    changed.info.update(recipe)
    Path("changed.png").write_bytes(pictures.encode_png(changed))
    assert run(["replay", "changed.png"]) == 1
    assert "differs in 1 of 1024 pixels" in capsys.readouterr().out


def test_replay_refuses(
    picture: Path, tiny_model_dir: Path, other_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["replay", str(picture), "--model", str(other_model_dir)]) == 2
    assert "drawn by another model" in one_error(capsys)
    assert run(["replay", "out/grid.png"]) == 2
    assert "holds no recipe" in one_error(capsys)
    assert run(["replay", "absent.png"]) == 2
    assert "no picture at absent.png" in one_error(capsys)
    Path("taken.png").touch()
    assert run(["replay", str(picture), "-o", "taken.png"]) == 2
    assert "taken.png exists" in one_error(capsys)
    # the recorded model is gone, then found again elsewhere
    moved = copy_model(tiny_model_dir, tmp_path / "moved")
    assert run(["generate", "cat", "--seed", "1", "--model", str(moved), "-o", "moved-out"]) == 0
    moved.rename(tmp_path / "moved-on")
    capsys.readouterr()
    assert run(["replay", "moved-out/cat-1.png"]) == 2
    assert "no model" in one_error(capsys)
    assert sorted(os.listdir("moved-out")) == ["cat-1.png", "grid.png"]
    assert run(["replay", "moved-out/cat-1.png", "--model", str(tmp_path / "moved-on")]) == 0


# threads


@pytest.mark.parametrize("chosen", ["1", None])
def test_threads_follow_the_environment(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(3)), raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    choose_threads()
    assert asked == [] if chosen else 1 <= asked[0] <= 3


def test_the_demo_command(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The Makefile's line, with the tiny model in place of the shipped one."""
    makefile = Path(__file__).parents[2] / "Makefile"
    line = next(line for line in makefile.read_text(encoding="utf-8").splitlines() if "mmwudao generate" in line)
    arguments = line.split("mmwudao generate ")[1].replace("$(DEMO)", str(tmp_path / "demo"))
    script = f'"{sys.executable}" -m mmwudao generate {arguments} --model "{tiny_model_dir}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"sheet: {tmp_path / 'demo' / 'grid.png'}"
    assert len(os.listdir(tmp_path / "demo")) == 13
    shutil.rmtree(tmp_path / "demo")
