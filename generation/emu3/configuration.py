"""A published folder of Emu3 (Wang et al. 2024, arXiv:2409.18869): what its config.json says.

It is in transformers' layout, or in the first one, whose picture tokenizer is another folder.

The language model is LLaMA (`generation.llama`), whose vocabulary holds the codes of pictures too. A picture's row is
`BOS prompt BOI "90*90" IMG`, then each row of codes with an end-of-line piece behind it, which is never sampled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.framed_text import PROMPT, FramedTokenizer
from generation.emu3.first_layout import MARKS, first_picture_fields, first_vocabulary
from generation.emu3.settings import Emu3Import
from generation.llama import LLAMA, llama_config, read_language
from generation.rows.frame import PromptFrame
from generation.transformer.config import TransformerConfig
from vqvae.movq import MoVQConfig
from vqvae.storage.folders import read_object
from vqvae.storage.parts import ModelError

BEGIN, BEGIN_IMAGE, IMAGE, END_OF_LINE = "<|extra_203|>", "<|image start|>", "<|image token|>", "<|extra_200|>"
CODE = re.compile(r"<\|visual token (\d{6})\|>")
# what `Emu3TextConfig` has otherwise
EMU3 = LLAMA | {
    "vocab_size": 184622, "intermediate_size": 14336, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 9216, "rope_theta": 1e6,
}  # fmt: skip
TOKENIZER: dict[str, Any] = {  # `Emu3VQVAEConfig`
    "codebook_size": 32768, "embed_dim": 4, "latent_channels": 4, "double_latent": False, "in_channels": 3,
    "out_channels": 3, "temporal_downsample_factor": 4, "base_channels": 256, "channel_multiplier": [1, 2, 2, 4],
    "num_res_blocks": 2, "attn_resolutions": [3], "hidden_size": 1024, "num_attention_heads": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Emu3Files:
    """A folder, its language model's fields, the sizes of its picture tokenizer, and the id of each code.

    `pictures` is the folder of the picture tokenizer, in the first layout.
    """

    folder: Path
    language: dict[str, Any]
    tokenizer: MoVQConfig
    code_ids: tuple[int, ...]
    pictures: Path | None = None

    @property
    def pieces(self) -> int:
        """The ids that become text pieces: those below the codes, or all of them where codes stand among others."""
        first, size = self.code_ids[0], int(self.language["vocab_size"])
        behind_one_another = self.code_ids == tuple(range(first, first + len(self.code_ids)))
        return first if behind_one_another and first + len(self.code_ids) == size else size


def read_emu3_folder(folder: Path, pictures: Path | None = None) -> Emu3Files:
    """What config.json says; `pictures` is the folder of the picture tokenizer, which the first layout has.

    Raises `ModelError` for another kind of model, and for what is not computed here.
    """
    path = folder / "config.json"
    record = read_object(path)
    kind = record.get("model_type")
    if kind == "Emu3":
        return _read_first_layout(folder, record, pictures)
    if kind != "emu3":
        raise ModelError(f"{path} describes no Emu3: its model_type is {kind!r}, not emu3")
    if pictures is not None:
        raise ModelError(f"{folder} has a picture tokenizer, as transformers stores Emu3: leave --tokenizer out")
    text, vq, named = (_object(record, name, path) for name in ("text_config", "vq_config", "vocabulary_map"))
    language, tokenizer = read_language(text, path, EMU3), _tokenizer(vq, path)
    return Emu3Files(folder, language, tokenizer, _code_ids(named, tokenizer, language["vocab_size"], path))


def _read_first_layout(folder: Path, record: Mapping[str, Any], pictures: Path | None) -> Emu3Files:
    if pictures is None:
        raise ModelError(f"{folder} has Emu3's first layout, without its picture tokenizer: give the folder of that, "
                         "Emu3-VisionTokenizer (--tokenizer)")  # fmt: skip
    language = read_language(record, folder / "config.json", EMU3)
    tokenizer = _tokenizer(first_picture_fields(pictures), pictures / "config.json")
    ids = _code_ids(first_vocabulary(folder), tokenizer, language["vocab_size"], folder / MARKS)
    return Emu3Files(folder, language, tokenizer, ids, pictures)


def _object(record: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    found = record.get(name)
    if not isinstance(found, dict):
        raise ModelError(f"{path} describes no Emu3 that draws: it has no {name}")
    return found


def _tokenizer(vq: Mapping[str, Any], path: Path) -> MoVQConfig:
    known = {name: vq.get(name, default) for name, default in TOKENIZER.items()}
    factor = known["temporal_downsample_factor"]
    try:
        config = MoVQConfig(
            channels=known["base_channels"],
            multipliers=list(known["channel_multiplier"]),
            residual_blocks=known["num_res_blocks"],
            attention_levels=list(known["attn_resolutions"]),
            code_dim=known["embed_dim"],
            codebook_size=known["codebook_size"],
            time_levels=int(factor).bit_length() - 1,
        )
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path} does not fit: {error}") from error
    only = {
        "latent_channels": config.code_dim, "double_latent": False, "in_channels": 3, "out_channels": 3,
        "num_attention_heads": 1, "hidden_size": config.widths[-1],
        "temporal_downsample_factor": 2**config.time_levels,
    }  # fmt: skip
    for name, value in only.items():
        if known[name] != value:
            raise ModelError(f"{path} has vq_config.{name} = {known[name]!r}; only {value!r} is computed here")
    return config


def _code_ids(named: Mapping[str, Any], tokenizer: MoVQConfig, size: int, path: Path) -> tuple[int, ...]:
    """The id of each code, `named` at `path`. Raises `ModelError` unless each has one of its own in the vocabulary."""
    found = {int(match[1]): number for name, number in named.items() if (match := CODE.fullmatch(str(name)))}
    ids = tuple(found.get(code, -1) for code in range(tokenizer.codebook_size))
    wrong = not all(isinstance(one, int) and 0 <= one < size for one in ids)
    if wrong or len(found) != len(ids) or len(set(ids)) != len(ids):
        raise ModelError(
            f"{path} does not fit: it names {len(found)} codes of pictures, and the tokenizer has "
            f"{len(ids)}, each with an id of its own below {size}"
        )
    return ids


def codes_of_a_side(files: Emu3Files, image_size: int) -> int:
    """Codes along a side of the pictures. Raises `ModelError` for a size that cannot be drawn."""
    stride = files.tokenizer.stride
    if image_size % stride:
        raise ModelError(f"the model cannot draw {image_size} px: a code stands for {stride}")
    return image_size // stride


def prompt_template(side: int, praise: str) -> str:
    """What a prompt stands in, with the size of the picture behind it."""
    return f"{BEGIN}{PROMPT}{praise}{BEGIN_IMAGE}{side}*{side}{IMAGE}"


def unwanted_frame(text: FramedTokenizer, side: int, unwanted: str, path: Path) -> PromptFrame:
    """The frame of a prompt: the row without it holds the text that is not wanted, in a template without praise.

    Raises `ModelError` for a text tokenizer without one of the marks.
    """
    absent = [mark for mark in (BEGIN, BEGIN_IMAGE, IMAGE, END_OF_LINE) if text.piece(mark) is None]
    if absent:
        raise ModelError(f"{path} is no text tokenizer of Emu3: it lacks {', '.join(absent)}")
    stored = text.encode_in(prompt_template(side, ""), unwanted)
    return PromptFrame("bare", without="stored", stored=stored)


def emu3_config(
    files: Emu3Files, text: FramedTokenizer, side: int, frame: PromptFrame, settings: Emu3Import
) -> TransformerConfig:
    """The transformer of the folder. Raises `ModelError` for a config.json that contradicts itself."""
    path = files.folder / "config.json"
    if len(frame.stored) > settings.max_text:
        raise ModelError(f"the text that is not wanted has {len(frame.stored)} pieces: say as many (--max-text)")
    return llama_config(
        files.language,
        path,
        settings.max_text + side * (side + 1),
        num_image_codes=files.tokenizer.codebook_size,
        num_text_pieces=files.pieces,
        max_text=settings.max_text,
        grid=(side, side),
        image_head="codes",
        frame=frame,
        row_end=text.piece(END_OF_LINE),
        noise="counter",
        block_rows=2 * settings.together,
    )
