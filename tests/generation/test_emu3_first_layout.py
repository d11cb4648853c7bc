"""Emu3's first layout: its own code's numbers, by golden files; its text's pieces; what is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.ranked_pieces import ranked_tokenizer
from generation.drawing.decoding import generate_codes
from generation.drawing.engines import Engine
from generation.drawing.sampling import SamplingOptions
from generation.emu3.first_layout import PATTERN
from generation.emu3.settings import Emu3Import
from mmwudao.loading.importing import import_emu3
from mmwudao.pipeline import Pipeline, load
from tests.helpers.cli import refused_import
from tests.helpers.emu3_first import FIRST, MARKS, RANKS, golden, save_first_layout
from tests.helpers.llamagen import random_tensor

PROMPT = "a red apple"
OPTIONS = ["--image-size", "8", "--unwanted", "bad."]
TEXTS = [
    "a red apple", "red", "aaaa aaa", "apple!! apples", "一只柴犬戴帽子 图图", "cafe\u0301 it's I'LL  two  spaces ",
    "line\n\n next\r\n", "123 x9", "🐕‍🦺 ok", " redred ared",
]  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_first_layout(tmp_path_factory.mktemp("emu3"))


@pytest.fixture(scope="module")
def pipeline(published: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    model, pictures = published
    settings = Emu3Import(image_size=8, unwanted="2", praise="")
    out = tmp_path_factory.mktemp("imported") / "model"
    return load(import_emu3(model, out, settings, tokenizer=pictures), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return golden()


@torch.no_grad()
def test_logits(pipeline: Pipeline, expected: dict[str, Tensor]) -> None:
    """Of a prompt, the codes behind it, and the end of a row."""
    config, length = pipeline.generator.config, len(expected["row"])
    row = expected["row"]
    tokens = torch.where(row >= FIRST, row - FIRST, row + config.vocabulary.text([0])[0])
    hidden = pipeline.generator(tokens[None], torch.arange(length)[None])
    found = pipeline.generator.logits(hidden[0, -len(expected["logits"]) :], image_only=True)
    assert float(expected["logits"].std()) > 0.5
    torch.testing.assert_close(found, expected["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("window", "kind"), [(1, "fused"), (1, "modules"), (4, "auto")])
def test_greedy_guided_codes(pipeline: Pipeline, expected: dict[str, Tensor], window: int, kind: Any) -> None:
    assert pipeline.generator.config.frame.stored == expected["other"].tolist()
    options = SamplingOptions(temperature=0, guidance=3.0, window=window)
    prompt = expected["prompt"].tolist()
    found = generate_codes(pipeline.generator, [prompt], [0], options, grid=pipeline.grid, engine=Engine(kind))
    assert found.flatten().tolist() == expected["drawn"].tolist()
    assert len(set(expected["drawn"].tolist())) > 3


@torch.no_grad()
def test_pictures_both_ways(pipeline: Pipeline, expected: dict[str, Tensor]) -> None:
    wanted = ((expected["pictures"] + 1) / 2).clamp(0, 1)
    assert float(wanted.std()) > 0.1
    found = pipeline.tokenizer.decode(torch.arange(32).view(2, 4, 4))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    pictures = (random_tensor("pictures", 3, 3, 8, 8) / 2 + 1) / 2
    assert torch.equal(pipeline.tokenizer.encode(pictures), expected["codes"])
    assert len(expected["codes"].unique()) > 5


def tiktoken_pieces(text: str) -> list[int]:
    """By the rule itself: of all neighbours, those with the lowest rank are joined first."""
    ranks = {piece: rank for rank, piece in enumerate(RANKS)}
    ids = []
    for part in regex.findall(PATTERN, text):
        pieces = [bytes([byte]) for byte in part.encode()]
        while len(pieces) > 1:
            joined = [ranks.get(first + second, 10**9) for first, second in zip(pieces, pieces[1:], strict=False)]
            if min(joined) == 10**9:
                break
            at = joined.index(min(joined))
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        whole = part.encode()
        ids += [ranks[whole]] if whole in ranks else [ranks[piece] for piece in pieces]
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_has_the_pieces_of_tiktoken(text: str) -> None:
    from unicodedata import normalize

    from tokenizers import Tokenizer

    ranks = {piece: rank for rank, piece in enumerate(RANKS)}
    tokenizer = Tokenizer.from_str(json.dumps(ranked_tokenizer(ranks, PATTERN, ["<|x|>", *MARKS])))
    wanted = tiktoken_pieces(normalize("NFC", text))
    assert tokenizer.encode(text, add_special_tokens=False).ids == wanted
    assert tokenizer.encode(f"<|x|>{text}{MARKS[0]}").ids == [len(RANKS), *wanted, len(RANKS) + 1]
    assert tokenizer.decode(wanted) == normalize("NFC", text)


def test_the_row(pipeline: Pipeline) -> None:
    text: Any = pipeline.text
    mark = {name: text.piece(name) for name in ("<|extra_203|>", "<|image start|>", "<|image token|>")}
    four = RANKS.index(b"4")
    size = [four, RANKS.index(b"*"), four]
    assert text.encode(PROMPT) == [
        mark["<|extra_203|>"], *tiktoken_pieces(PROMPT), mark["<|image start|>"], *size, mark["<|image token|>"],
    ]  # fmt: skip


def _change_json(name: str, **changes: Any) -> Callable[[Path, Path], None]:
    def change(model: Path, pictures: Path) -> None:
        path = (model if name == "model" else pictures) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _lose(key: str) -> Callable[[Path, Path], None]:
    def change(model: Path, pictures: Path) -> None:
        for path in (model / "model.safetensors", pictures / "model.safetensors"):
            tensors = load_file(path)
            if tensors.pop(key, None) is not None:
                save_file(tensors, path)

    return change


def _append(name: str, line: str) -> Callable[[Path, Path], None]:
    def change(model: Path, pictures: Path) -> None:
        with (model / name).open("a") as file:
            file.write(f"{line}\n")

    return change


WRONG: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a tensor of pictures": (_lose("decoder.up.1.attn.0.norm.conv_y.bias"), "missing: decoder.up.1.attn.0.norm.conv_y"),
    "a tensor of text": (_lose("model.layers.1.self_attn.k_proj.weight"), "missing: model.layers.1.self_attn.k_proj"),
    "another folder": (_change_json("pictures", model_type="clip"), "its model_type is 'clip', not Emu3VisionVQ"),
    "its widths": (_change_json("pictures", ch_mult="wide"), "does not fit"),
    "fewer codes": (_change_json("pictures", codebook_size=40), "names 48 codes of pictures, and the tokenizer has 40"),
    "rotary positions": (_change_json("model", rope_scaling={"type": "linear", "factor": 2.0}), "has rope_scaling ="),
    "no ranks": (lambda model, _: (model / "emu3.tiktoken").unlink(), "no text tokenizer at"),
    "damaged ranks": (_append("emu3.tiktoken", "no rank"), "emu3.tiktoken is damaged: its lines are no pieces"),
    "a gap": (_append("emu3.tiktoken", "YWJj 999"), "its pieces are not numbered from 0 on"),
    "no names": (lambda model, _: (model / "emu3_vision_tokens.txt").unlink(), "emu3_vision_tokens.txt is missing"),
    "a name twice": (_append("emu3_vision_tokens.txt", "<|image end|>"), "it names a mark twice"),
    "too many marks": (_append("emu3_vision_tokens.txt", "<|more|>"), "and its model"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(
    published: tuple[Path, Path], tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = WRONG[case]
    model, pictures = (shutil.copytree(folder, tmp_path / folder.name) for folder in published)
    change(model, pictures)
    arguments = [str(model), "--tokenizer", str(pictures), *OPTIONS]
    assert message in refused_import("emu3", arguments, capsys, tmp_path / "out")


def test_each_layout_wants_its_own_folders(
    published: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, pictures = published
    out, later = tmp_path / "out", tmp_path / "Emu3-Gen-hf"
    later.mkdir()
    (later / "config.json").write_text('{"model_type": "emu3"}')
    for arguments, message in (
        ([str(model)], "give the folder of that, Emu3-VisionTokenizer (--tokenizer)"),
        ([str(model), "--tokenizer", str(tmp_path / "nowhere")], "no picture tokenizer at"),
        ([str(later), "--tokenizer", str(pictures)], "leave --tokenizer out"),
    ):
        assert message in refused_import("emu3", [*arguments, *OPTIONS], capsys, out), message
