"""CogView as published (Ding et al. 2021, arXiv:2105.13290): its sizes, rows, query language and training loss.

The transformer itself is `generation.transformer.model.Transformer` with `cogview_config`; sampling is in
`generation.cogview.sampler`, reading the published files in `generation.cogview.importing`.
Shapes: B rows, T tokens, P positions, N image codes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from generation.rows.row import COMMANDS_IN_ROW
from generation.rows.vocabulary import COMMANDS, Vocabulary
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer

POSITIONS = 1089  # rows of the published position table: 61 text pieces, 32 x 32 codes, four commands
TEXT_SLOTS = 64  # of a row in the published binary training files
logger = logging.getLogger(__name__)

MASK = -1  # "to be generated"

_SIZES: dict[str, dict[str, int]] = {
    "cogview-4b": {"width": 2560, "depth": 48, "heads": 40},
    "cogview-caption": {"width": 2560, "depth": 48, "heads": 40},
    "cogview-sr": {"width": 2560, "depth": 48, "heads": 40},
    "cogview-small": {"width": 1024, "depth": 12, "heads": 16},  # the training scripts of the tutorial
}
PRESETS = tuple(_SIZES)
# width -> layers of the models whose weights are published; "cogview-small" is a configuration without weights
PUBLISHED_DEPTHS = {_SIZES[name]["width"]: _SIZES[name]["depth"] for name in PRESETS if name != "cogview-small"}


def cogview_config(preset: str = "cogview-4b", *, positions: int = POSITIONS, **overrides: Any) -> TransformerConfig:
    """The transformer of a published model: `PRESETS`. `positions` is the size of its position table.

    Precision-bottleneck relaxation is off and LayerNorm scales by the whole tensor's maximum, as in the published
    code (the paper describes the relaxation instead). Raises `ValueError` for an unknown preset.
    """
    if preset not in _SIZES:
        raise ValueError(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
    settings: dict[str, Any] = {
        **_SIZES[preset],
        "num_image_codes": 8192,
        "num_text_pieces": 50000,
        "grid": (32, 32),
        "norm": "max_scaled_layernorm",
        "pb_relax": 0.0,
        "dropout": 0.1,
        "image_softmax": "full",
        **overrides,
    }
    height, width = settings["grid"]
    settings.setdefault("max_text", positions - height * width - COMMANDS_IN_ROW)
    if settings["max_text"] < 0:
        raise ValueError(f"{positions} positions are too few for {height}x{width} codes and four commands")
    return TransformerConfig.cogview(**settings)


# rows


def text_image_row(vocab: Vocabulary, text: Sequence[int], codes: Sequence[int]) -> list[int]:
    """`[ROI1] text [SIZE] [BOI1] codes [EOI1]`. `text` is in the joint id space, `codes` are a square picture."""
    head = [vocab.command("[ROI1]"), *text, _size(vocab, codes), vocab.command("[BOI1]")]
    return [*head, *codes, vocab.command("[EOI1]")]


def two_image_row(vocab: Vocabulary, text: Sequence[int], codes: Sequence[int], more: Sequence[int]) -> list[int]:
    """A row of one text and two pictures, the second after `[SIZE] [BOI2]`."""
    second = [_size(vocab, more), vocab.command("[BOI2]"), *more, vocab.command("[EOI2]")]
    return [*text_image_row(vocab, text, codes), *second]


def _size(vocab: Vocabulary, codes: Sequence[int]) -> int:
    side = round(len(codes) ** 0.5)
    if side * side != len(codes):
        raise ValueError(f"{len(codes)} codes are no square picture")
    return vocab.size_command((side, side))


def read_binary_rows(path: Path | str, vocab: Vocabulary, positions: int = POSITIONS) -> tuple[Tensor, Tensor]:
    """Tokens and loss mask, both [n, P] int64, of a published binary training file.

    A record is 64 text ids in the joint id space (-1: empty) and 1024 codes, int32. A row shorter than P is padded
    with [PAD], which is masked; of a longer one (more than 61 text ids) the end is cut off, as the original does.
    Raises `ValueError` for a file that is not whole records.
    """
    record = TEXT_SLOTS + 1024
    data = numpy.fromfile(path, dtype="<i4")
    if not data.size or data.size % record:
        raise ValueError(f"{path} is not made of records of {record} 32-bit numbers: is it truncated?")
    records = data.reshape(-1, record)
    tokens = torch.full((len(records), positions), vocab.command("[PAD]"))
    mask = torch.zeros(len(records), positions, dtype=torch.int64)
    for i, values in enumerate(records):
        text = values[:TEXT_SLOTS]
        row = text_image_row(vocab, text[text >= 0].tolist(), values[TEXT_SLOTS:].tolist())[:positions]
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return tokens, mask


def restarted_positions(vocab: Vocabulary, tokens: Tensor, positions: int | None = None) -> Tensor:
    """Positions [B, T] of finetuning for super-resolution: counted anew from 0 ON the first [ROI2] of each row.

    `positions` is the size of the model's position table, `config.num_positions`. Without it, that of the published
    models is assumed, with a warning where the rows are longer. What lies beyond the table is clamped to its last
    entry. (In sampling, [ROI2] itself keeps its absolute position: `generation.cogview.sampler`.) Raises `ValueError`
    for a row without [ROI2].
    """
    if positions is None:
        positions = POSITIONS
        if tokens.shape[1] > POSITIONS:
            logger.warning("no size of a position table was given: positions are clamped to those of %d", POSITIONS)
    elif positions < 1:
        raise ValueError(f"a position table has at least one entry, not {positions}")
    marks = tokens == vocab.command("[ROI2]")
    if not marks.any(dim=1).all():
        raise ValueError("every row needs an [ROI2], where its positions start again")
    start = marks.int().argmax(dim=1, keepdim=True)
    absolute = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return torch.where(absolute >= start, absolute - start, absolute).clamp(max=positions - 1)


# query language


def parse_query(
    query: str,
    vocab: Vocabulary,
    encode: Callable[[str], list[int]],
    read_codes: Callable[[str], list[int]] | None = None,
) -> list[int]:
    """A query as a row: ids, and -1 where a token is to be generated.

    Words are separated by single spaces. A command is its id, `[MASK]*n` n places to fill, `[Image]path` the codes of
    a picture (by `read_codes`), `[Imagek]path` the codes with everything from number k on to be filled. The words
    between are joined again and encoded in one piece (`encode`: raw text pieces). Raises `ValueError` for a picture
    where none can be read.
    """
    row: list[int] = []
    words: list[str] = []

    def flush() -> None:
        row.extend(vocab.text(encode(" ".join(words))))
        words.clear()

    for word in query.split(" "):
        masks = re.fullmatch(r"\[MASK\](?:\*(\d+))?", word)
        picture = re.fullmatch(r"\[Image(\d*)\](.+)", word)
        if not (masks or picture or word in COMMANDS):
            words.append(word)
            continue
        flush()
        if masks:
            row.extend([MASK] * int(masks[1] or 1))
        elif picture:
            if read_codes is None:
                raise ValueError(f"{word}: this query may not name pictures")
            codes = read_codes(picture[2])
            kept = int(picture[1]) if picture[1] else len(codes)
            row.extend([*codes[:kept], *([MASK] * (len(codes) - kept))])
        else:
            row.append(vocab.command(word))
    flush()
    return row


def fill_template(template: str, text: str) -> str:
    """A template such as `[ROI1] {} [BASE] [BOI1] [MASK]*1024` with the tab-separated arguments in `text`.

    Arguments beyond its slots are left out, as in the original. Raises `ValueError` for too few.
    """
    try:
        return template.format(*text.split("\t"))
    except IndexError as error:
        raise ValueError(f"the template {template!r} has more slots than {text!r} has tab-separated parts") from error


# training


def cogview_loss(
    model: Transformer, tokens: Tensor, loss_mask: Tensor, text_scale: float = 1.0, positions: Tensor | None = None
) -> dict[str, Tensor]:
    """`loss`, and for the log `image_loss` and `text_loss` (nats), of rows [B, T + 1] with their mask.

    The text scale weighs places whose INPUT is no image code: predicting the first code counts as text, predicting
    [EOI1] after the last code as image. The loss is divided by the sum of the weights, the scale included.
    `positions` [B, T] are 0, 1, 2, ... if not given.
    """
    vocab = model.config.vocabulary
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if positions is None:
        positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    logits = model.logits(model(inputs, positions)).float()
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # [B, T]
    image = inputs < vocab.num_image_codes
    text = ~image & (targets != vocab.command("[PAD]"))
    weights = torch.where(text, text_scale, 1.0) * loss_mask[:, 1:]
    weighted = losses * weights
    return {
        "loss": weighted.sum() / weights.sum(),
        "image_loss": (weighted[image].sum() / image.sum()).detach(),
        "text_loss": (weighted[text].sum() / text.sum() / text_scale).detach(),
    }
