"""A published folder of Janus (Chen et al. 2025, arXiv:2501.17811): what its config.json says, and its text tokenizer.

The language model is LLaMA (`generation.llama`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.framed_text import PROMPT, FramedTokenizer
from generation.janus.settings import JanusImport
from generation.llama import llama_config, read_language
from generation.rows.frame import MARKS_IN_FRAME, PromptFrame
from generation.transformer.config import TransformerConfig
from vqvae.storage.folders import read_object
from vqvae.storage.parts import ModelError
from vqvae.vq16 import VQ16Config
from vqvae.vq16_keys import KeyLayout

LAYOUTS_BY_TYPE: dict[str, KeyLayout] = {"multi_modality": "original", "janus": "transformers"}
TEMPLATES = {
    "pro": f"<|User|>: {PROMPT}\n\n<|Assistant|>:",
    "first": f"User: {PROMPT}\n\nAssistant:",
}
# their numbers differ between published files, their names do not
MARKS = {"begin": "<｜begin▁of▁sentence｜>", "end": "<begin_of_image>", "blank": "<｜▁pad▁｜>"}
FLOW = "it is JanusFlow, which draws by rectified flow and not by codes: Janus and Janus-Pro are read"


@dataclass(frozen=True)
class JanusFiles:
    """A folder's layout of keys, its language model's fields, and the pixels of a side of its pictures."""

    folder: Path
    layout: KeyLayout
    language: dict[str, Any]
    image_size: int
    named: str  # what the folder and its files call the model


def read_janus_folder(folder: Path) -> JanusFiles:
    """What config.json says. Raises `ModelError` for another kind of model, and for what is not computed here."""
    path = folder / "config.json"
    record = read_object(path)
    if any(key.startswith("vision_gen_") for key in record):
        raise ModelError(f"{folder} is refused: {FLOW}")
    layout = LAYOUTS_BY_TYPE.get(str(record.get("model_type")))
    if layout is None:
        wanted = " or ".join(LAYOUTS_BY_TYPE)
        raise ModelError(f"{path} describes no Janus: its model_type is {record.get('model_type')!r}, not {wanted}")
    language = _object(record, "language_config" if layout == "original" else "text_config", path)
    vision = _object(record, "vision_config", path)
    side = _object(vision, "params", path).get("image_size") if layout == "original" else vision.get("image_size", 384)
    if not isinstance(side, int) or isinstance(side, bool):
        raise ModelError(f"{path} does not say how large pictures are: image_size is {side!r}")
    known = read_language(language, path)
    return JanusFiles(folder, layout, known, side, f"{folder.resolve().name} {record.get('_name_or_path', '')}".lower())


def _object(record: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    found = record.get(name)
    if not isinstance(found, dict):
        raise ModelError(f"{path} describes no Janus: it has no {name}")
    return found


def choose_template(files: JanusFiles, text: Path, wanted: str) -> str:
    """The chat template. Of the published models only Janus-1.3B has the first one, and its files do not say so."""
    if wanted == "auto":
        marked = "<|User|>" in text.read_text(encoding="utf-8", errors="replace") if text.is_file() else True
        wanted = "first" if "1.3b" in files.named or not marked else "pro"
    return TEMPLATES[wanted]


def prompt_frame(text: FramedTokenizer, path: Path) -> PromptFrame:
    """The marks around a prompt, by their names. Raises `ModelError` for a text tokenizer without one of them."""
    found = {mark: text.piece(name) for mark, name in MARKS.items()}
    absent = [MARKS[mark] for mark, piece in found.items() if piece is None]
    if absent:
        raise ModelError(f"{path} is no text tokenizer of Janus: it lacks {', '.join(absent)}")
    pieces: dict[str, Any] = {mark: piece for mark, piece in found.items() if piece is not None}
    return PromptFrame("marks", **pieces)


def janus_config(
    files: JanusFiles, tokenizer: VQ16Config, frame: PromptFrame, settings: JanusImport
) -> TransformerConfig:
    """The transformer of the folder. Raises `ModelError` for a config.json that contradicts itself or the tokenizer."""
    language, path = files.language, files.folder / "config.json"
    if files.image_size < 1 or files.image_size % tokenizer.stride:
        raise ModelError(f"{path} says pictures of {files.image_size} px, and a code stands for {tokenizer.stride}")
    side = files.image_size // tokenizer.stride
    return llama_config(
        language,
        path,
        settings.max_text + MARKS_IN_FRAME + side * side,
        num_image_codes=tokenizer.codebook_size,
        num_text_pieces=language["vocab_size"],
        max_text=settings.max_text,
        grid=(side, side),
        image_head="mlp",
        frame=frame,
        block_rows=2 * settings.together,
    )
