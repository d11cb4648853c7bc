"""Drawing, and drawing again: `mmwudao.pipeline`, `mmwudao.pictures`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy
import pytest
from PIL import Image

from data.atomic import write_files
from data.styles import guess_language
from mmwudao import load
from mmwudao.loading.model_dir import read_model_config
from mmwudao.pictures import differing_pixels, encode_png, file_stem, grid, read_recipe, unused_path
from mmwudao.pipeline import MAX_PICTURES, MAX_PROMPT, DrawingProgress, Pipeline
from vqvae.storage.parts import ModelError


@pytest.fixture(scope="module")
def pipe(tiny_model_dir: Path) -> Pipeline:
    return load(tiny_model_dir, device="cpu", dtype="float32")


def pixels(image: Image.Image) -> bytes:
    return image.tobytes()


# drawing


def test_generate_returns_pictures_with_recipes(pipe: Pipeline, tiny_model_dir: Path) -> None:
    images = pipe.generate(["红心", "a red apple"], n=2, seed=7, style="noto", sampling={"top_k": 5})
    assert [image.size for image in images] == [(32, 32)] * 4
    assert [image.info["seed"] for image in images] == [7, 8, 9, 10]
    assert [image.info["text"] for image in images[1:3]] == ["红心, noto 风格", "a red apple, noto style"]
    info = images[0].info
    # given where given, else the model's own defaults
    assert (info["top_k"], info["temperature"], info["top_p"], info["guidance"]) == (5, 0.9, 0.95, 2.0)
    assert info["model_hash"] == read_model_config(tiny_model_dir).model_hash
    assert (info["device"], info["dtype"], info["style"], info["prompt"]) == ("cpu", "float32", "noto", "红心")


def test_a_picture_depends_on_its_own_prompt_and_seed_only(pipe: Pipeline) -> None:
    alone = pipe.generate("月亮", seed=11)[0]
    among = pipe.generate(["red heart", "月亮"], n=9, seed=2)[9]
    assert among.info["seed"] == 11
    assert pixels(alone) == pixels(among)
    assert pixels(alone) != pixels(pipe.generate("月亮", seed=12)[0])


def test_without_a_seed_one_is_drawn_and_recorded(pipe: Pipeline) -> None:
    first, second = pipe.generate("cat")[0], pipe.generate("cat")[0]
    assert first.info["seed"] != second.info["seed"]
    assert pixels(pipe.generate("cat", seed=first.info["seed"])[0]) == pixels(first)


@pytest.mark.parametrize("prompt", ["🍎❤️👩‍🚀", "قلب أحمر", "לב אדום", "𒀭𒂗𒆤", "हृदय", "e\u0301\u200d\x07", "a\nb"])
def test_any_script_works(pipe: Pipeline, prompt: str) -> None:
    image = pipe.generate(prompt, seed=1, style="twemoji")[0]
    assert image.info["prompt"] == prompt


def test_progress_counts_every_step_and_previews_grow(pipe: Pipeline) -> None:
    seen: list[tuple[int, int, int]] = []
    previews: list[list[Image.Image]] = []

    def watch(progress: DrawingProgress) -> None:
        seen.append((progress.done, progress.total, progress.rows))
        previews.append(progress.preview())

    images = pipe.generate("a red apple", n=9, seed=3, on_progress=watch)  # two blocks of guided pictures
    assert [done for done, _, _ in seen] == list(range(1, 33))
    assert seen[-1] == (32, 32, 8)
    assert all(len(pictures) == 9 for pictures in previews)
    white = Image.new("RGB", (32, 32), "white")
    assert pixels(previews[0][0]) == pixels(white)
    assert pixels(previews[8][0].crop((0, 16, 32, 32))) == pixels(white.crop((0, 16, 32, 32)))
    assert [pixels(image) for image in previews[-1]] == [pixels(image) for image in images]
    # the second block was not begun when the first was done
    assert pixels(previews[15][8]) == pixels(white)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " \n"}, "empty prompt"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": "x" * (MAX_PROMPT + 1)}, f"at most {MAX_PROMPT}"),
        ({"prompt": "\udc80"}, "not valid Unicode"),
        ({"n": 0}, "at least 1"),
        ({"n": MAX_PICTURES + 1}, f"at most {MAX_PICTURES}"),
        ({"style": "cubism"}, "unknown style 'cubism'; this model knows: noto, twemoji"),
        ({"seed": -1}, "the seed must lie in"),
        ({"sampling": {"temperature": -1.0}}, "temperature"),
        ({"sampling": {"top_k": -1}}, "top_k"),
        ({"sampling": {"top_p": 1.5}}, "top_p"),
        ({"sampling": {"guidance": -1.0}}, "guidance"),
        ({"sampling": {"heat": 1.0}}, "unknown sampling option 'heat'; choose from temperature"),
    ],
)
def test_bad_arguments_are_one_clear_line(pipe: Pipeline, change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"prompt": "a", "n": 1, "seed": 0} | change
    with pytest.raises(ValueError, match=message) as caught:
        pipe.generate(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_text_beyond_the_models_length_is_cut(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipe.generate("wörter " * 100, seed=0)
    assert "reads 24 pieces of text at most" in caplog.text


# pictures


def test_the_recipe_survives_the_png(pipe: Pipeline, tmp_path: Path) -> None:
    image = pipe.generate("戴墨镜的笑脸 😎 قلب", seed=5, sampling={"temperature": 1 / 3})[0]
    path = tmp_path / "picture.png"
    path.write_bytes(encode_png(image))
    recipe = read_recipe(path)
    assert recipe == {name: value for name, value in image.info.items() if value is not None}
    assert Image.open(path).text["Software"].startswith("mmwudao ")  # type: ignore[attr-defined]


def test_redraw_is_the_identical_picture(pipe: Pipeline, tmp_path: Path) -> None:
    image = pipe.generate(["cat", "红心"], n=3, seed=5, style="noto")[4]
    path = tmp_path / "picture.png"
    path.write_bytes(encode_png(image))
    again = pipe.redraw(read_recipe(path))
    assert again.info == image.info
    assert differing_pixels(path, again) == 0


def test_redraw_refuses_another_model(pipe: Pipeline, other_model_dir: Path) -> None:
    recipe = {str(name): value for name, value in pipe.generate("cat", seed=5)[0].info.items()}
    with pytest.raises(ModelError, match="drawn by another model"):
        load(other_model_dir).redraw(recipe)


def test_read_recipe_refuses_what_is_not_ours(tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    Image.new("RGB", (4, 4)).save(plain)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    image = Image.new("RGB", (4, 4))
    image.info = {"prompt": "half a recipe"}
    half = tmp_path / "half.png"
    half.write_bytes(encode_png(image))
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(half.read_bytes()[:-40])
    for path, message in (
        (plain, "holds no recipe"),
        (half, "holds no recipe"),
        (text, "cannot be read"),
        (truncated, "cannot be read"),
        (tmp_path, "no picture at"),
        (tmp_path / "absent.png", "no picture at"),
    ):
        with pytest.raises(ValueError, match=message):
            read_recipe(path)


def test_a_damaged_recipe_is_named(pipe: Pipeline, tmp_path: Path) -> None:
    image = pipe.generate("cat", seed=5)[0]
    image.info = image.info | {"seed": "seven"}
    path = tmp_path / "picture.png"
    path.write_bytes(encode_png(image))
    with pytest.raises(ValueError, match="damaged recipe"):
        read_recipe(path)


def test_differing_pixels_counts_pixels_not_channels(tmp_path: Path) -> None:
    original, changed = Image.new("RGB", (5, 3)), Image.new("RGB", (5, 3))
    path = tmp_path / "original.png"
    original.save(path)
    changed.putpixel((0, 0), (1, 1, 0))
    changed.putpixel((4, 2), (0, 0, 255))
    assert differing_pixels(path, original) == 0
    assert differing_pixels(path, changed) == 2
    assert differing_pixels(path, Image.new("RGB", (2, 2))) == 4


def test_grid() -> None:
    images = [Image.new("RGB", (10, 10), (k, 0, 0)) for k in range(1, 6)]
    sheet = numpy.asarray(grid(images, columns=2, gap=1))
    assert sheet.shape == (3 * 11 + 1, 2 * 11 + 1, 3)
    assert sheet[5, 5, 0] == 1
    assert sheet[5, 16, 0] == 2
    assert sheet[27, 5, 0] == 5
    assert (sheet[27, 16] == 255).all()
    assert grid(images, columns=9, gap=0).size == (50, 10)
    with pytest.raises(ValueError, match="at least one picture"):
        grid([])
    with pytest.raises(ValueError, match="at least one column"):
        grid(images, columns=0)


def test_file_names(tmp_path: Path) -> None:
    assert file_stem("A red apple!", 7) == "A-red-apple-7"
    assert file_stem("戴墨镜的笑脸", 0) == "戴墨镜的笑脸-0"
    assert file_stem("🍎/../❤", 1) == "picture-1"
    assert len(file_stem("红" * 500, 2**62).encode()) < 100
    (tmp_path / "a.png").touch()
    assert unused_path(tmp_path, "a") == tmp_path / "a-2.png"
    assert unused_path(tmp_path, "a", taken=frozenset({tmp_path / "a-2.png"})) == tmp_path / "a-3.png"


def test_files_are_written_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {tmp_path / "a": b"one", tmp_path / "b": b"two"}
    write = Path.write_bytes

    def fails_at_the_second(path: Path, data: bytes) -> int:
        if data == b"two":
            write(path, data[:1])
            raise OSError(28, "No space left on device", str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fails_at_the_second)
    with pytest.raises(OSError, match="No space"):
        write_files(files)
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    write_files(files)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("戴墨镜的笑脸", "zh"),
        ("赤いハート", "ja"),
        ("빨간 하트", "ko"),
        ("a red apple", "en"),
        ("die lachende Katze", "de"),
        ("grüner Baum", "de"),
        ("červené jablko", "cs"),
        ("une pomme", "fr"),
        ("cœur", "fr"),
        ("قلب", "en"),
    ],
)
def test_guess_language(text: str, language: str) -> None:
    assert guess_language(text) == language


@pytest.mark.gpu
def test_cuda_repeats_itself_whatever_the_batch(tiny_model_dir: Path) -> None:
    pipe = load(tiny_model_dir, device="cuda")
    many = pipe.generate(["cat", "红心"], n=12, seed=3)
    again = pipe.generate("红心", seed=3 + 20)[0]
    assert pixels(again) == pixels(many[20])
    assert again.info["device"] == "cuda"


def test_int8_and_the_engine_are_part_of_the_recipe(tiny_model_dir):
    pipe = load(tiny_model_dir, "cpu", "int8", engine="modules")
    assert pipe.dtype == "int8"
    picture = pipe.generate("cat", seed=1)[0]
    assert (picture.info["dtype"], picture.info["engine"]) == ("int8", "modules")
    assert "engine" not in load(tiny_model_dir, "cpu").generate("cat", seed=1)[0].info
    with pytest.raises(ValueError, match="graph engine needs a CUDA device"):
        load(tiny_model_dir, "cpu", engine="graph")
    with pytest.raises(ValueError, match="unknown engine 'best'"):
        load(tiny_model_dir, "cpu", engine="best")  # type: ignore[arg-type]
