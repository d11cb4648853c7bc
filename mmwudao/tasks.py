"""What a loaded model does besides drawing: describe pictures, choose among them, complete one.

`mmwudao.pipeline.Pipeline` has methods of the same names. Shapes: n pictures of h x w codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy
import torch
from PIL import Image
from torch import Tensor

from data.images import open_image, to_rgb, to_square, to_tensor
from data.sample import DataError
from data.styles import guess_language, tagged
from generation.captions import OnStep, caption_log_probabilities, describe, describe_for_judge
from generation.cogview.sampler import caption_scores
from generation.rows.describe import caption_prompt_row
from mmwudao.loading.loaded import LoadedModel
from mmwudao.loading.model_dir import ModelConfig
from vqvae.storage.parts import ModelError

COGVIEW_PIECES = 20  # of a caption by CogView's own model, whose text has no end mark; its script draws as many
BEAMS = 4

Judge = Literal["caption", "towers", "both"]
Writer = Literal["auto", "generator", "both"]


class ConfiguredModel(Protocol):
    """A model as far as the checks need it: its parts need not be loaded."""

    @property
    def source(self) -> str: ...

    @property
    def config(self) -> ModelConfig: ...


def read_pictures(paths: Sequence[Path]) -> list[Image.Image]:
    """Decode the pictures. Raises `ValueError` naming the first file that is missing or no picture."""
    pictures = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"no picture at {path}")
        try:
            pictures.append(open_image(path))
        except DataError as error:
            raise ValueError(f"{path}: {error}") from error
    return pictures


def encode_pictures(model: LoadedModel, images: Sequence[Image.Image]) -> Tensor:
    """Codes [n, h, w] of pictures of any size: the centre square of each, at the model's size."""
    if not images:
        raise ValueError("no picture: give at least one")
    size = model.config.image_size
    # one at a time: a batch's convolutions may round differently from a single picture's
    squares = [to_tensor(to_square(to_rgb(image), size))[None].to(model.device) for image in images]
    with torch.inference_mode():
        return torch.cat([model.tokenizer.encode(square) for square in squares])


def caption_pictures(
    model: LoadedModel,
    images: Sequence[Image.Image],
    language: str | None = None,
    by: Writer = "auto",
    on_step: OnStep | None = None,
) -> list[str]:
    """The best description of each picture that beam search finds, in `language` (default: the model's first).

    `by` "generator": the generator writes alone. "both": the model's towers judge what it writes, piece by piece
    (`generation.captions.describe_for_judge`). "auto": both, where the model has towers and knows where a text ends.
    `on_step` is called before every piece: an exception it raises stops the search.

    Raises `ModelError` for a model that cannot, `ValueError` for a language it does not know, or no picture.
    """
    kind, languages = check_describes(model), model.config.languages
    if by not in get_args(Writer):
        raise ValueError(f"unknown writer {by!r}; choose from {', '.join(get_args(Writer))}")
    able = kind == "tagged" and "towers" in model.config.parts
    if by == "both" and not able:
        raise ModelError(f"{model.source} has no towers, or its texts have no end: caption by the generator alone")
    if language is not None and language not in languages:
        raise ValueError(f"unknown language {language!r}; this model describes in: {', '.join(languages)}")
    start = model.text.encode(tagged("", language or languages[0]).rstrip()) if kind == "tagged" else []
    captions = []
    if able and by != "generator":
        for image, codes in zip(images, encode_pictures(model, images), strict=True):
            best, _ = describe_for_judge(model.generator, codes, _judge(model, image), start, on_step=on_step)[0]
            captions.append(model.text.decode(best.pieces).strip())
        return captions
    for codes in encode_pictures(model, images):
        found = describe(
            model.generator,
            codes,
            start,
            beams=BEAMS,
            max_pieces=None if kind == "tagged" else COGVIEW_PIECES,
            ends=kind == "tagged",
            on_step=on_step,
        )
        captions.append(model.text.decode(found[0].pieces).strip())
    return captions


def _judge(model: LoadedModel, image: Image.Image) -> Callable[[list[list[int]]], Tensor]:
    """How well texts fit `image` by the model's towers: cosines over the temperature they were trained with, in nats.

    At the optimum of their contrastive loss that is the pointwise mutual information, but for a constant (van den Oord
    et al. 2018, arXiv:1807.03748, section 2.3), and so what the picture adds to a text's own probability.
    """
    towers = model.towers
    features, scale = towers.encode_image([image])[0], float(towers.scale.detach())

    def judge(texts: list[list[int]]) -> Tensor:
        return scale * (towers.encode_text([model.text.decode(pieces).strip() for pieces in texts]) @ features)

    return judge


def score_pictures(
    model: LoadedModel, prompt: str, images: Sequence[Image.Image], by: Judge = "caption", codes: Tensor | None = None
) -> list[float]:
    """How well each picture shows the prompt, more is better. Scores compare pictures for one prompt, not prompts.

    "caption": the log probability (nats) of the prompt as the picture's description, CogView's post-selection (section
    3.3) by inverse prompting (Zou et al. 2021, arXiv:2103.10685). "towers": the cosine of the two towers. "both": the
    mean of the two, each standardised over the pictures. `codes` [n, h, w] are the pictures' if they are known.

    Raises `ValueError` for no picture, `ModelError` for a model that cannot describe, or has no towers.
    """
    check_judge(model, by)
    if not images:
        raise ValueError("no picture: give at least one")
    scores = []
    if by != "towers":
        codes = encode_pictures(model, images) if codes is None else codes
        scores.append(torch.tensor(score_codes(model, prompt, codes, guess_language(prompt))))
    if by != "caption":
        scores.append(model.towers.encode_image(list(images)) @ model.towers.encode_text([prompt])[0])
    if len(scores) > 1:
        scores = [(one - one.mean()) / one.std(correction=0).clamp_min(1e-6) for one in scores]
    return torch.stack(scores).mean(dim=0).tolist()


def check_judge(model: ConfiguredModel, by: str) -> None:
    """`ValueError` for an unknown judge, `ModelError` for one that the model is not."""
    if by not in get_args(Judge):
        raise ValueError(f"unknown judge {by!r}; choose from {', '.join(get_args(Judge))}")
    if by != "towers":
        check_describes(model)
    if by != "caption" and "towers" not in model.config.parts:
        raise ModelError(f"{model.source} has no towers to judge pictures by: judge them by caption")


def score_codes(model: LoadedModel, prompt: str, codes: Tensor, language: str) -> list[float]:
    """Log probability (nats) of the prompt as a description of each picture of `codes` [n, h, w]."""
    kind = check_describes(model)
    if kind == "tagged":
        start = model.text.encode(tagged("", language).rstrip())
        text = model.text.encode(tagged(prompt, language))
        # the tag is spelled alike with and without a text behind it, or it would not be what was learned
        common = next((i for i, (a, b) in enumerate(zip(start, text, strict=False)) if a != b), len(start))
        return caption_log_probabilities(model.generator, codes, text, common).tolist()
    text = model.text.encode(prompt)[: model.generator.config.max_text]
    rows = [caption_prompt_row(model.generator.config.vocabulary, one, text) for one in codes.cpu()]
    return caption_scores(model.generator, torch.tensor(rows)).tolist()


def kept_cells(keep: str | Path | Image.Image, grid: tuple[int, int]) -> Tensor:
    """Which codes [h, w] stay (bool): `top:0.5`, `left:0.5`, or a mask whose white pixels stay (a file, or a picture).

    Raises `ValueError` for anything else, and for a mask that is neither a start in raster order nor a left part: a
    code is drawn in sight of what comes before it, so it could not fit what is kept behind it.
    """
    height, width = grid
    cells = torch.zeros(grid, dtype=torch.bool)
    side, _, share = str(keep).partition(":")
    if isinstance(keep, str) and side in ("top", "left") and share:
        try:
            part = float(share)
        except ValueError as error:
            raise ValueError(f"keep {keep!r}: a share is a number such as 0.5") from error
        count = round(part * (height if side == "top" else width)) if 0 < part < 1 else 0
        if not 0 < count < (height if side == "top" else width):
            raise ValueError(f"keep {keep!r}: the share must leave something to keep and something to draw")
        cells[(slice(count),) if side == "top" else (slice(None), slice(count))] = True
        return cells
    if isinstance(keep, str) and not Path(keep).is_file():
        raise ValueError(f"keep {keep!r}: say top:0.5, left:0.5, or name a mask picture whose white part stays")
    mask = keep if isinstance(keep, Image.Image) else read_pictures([Path(keep)])[0]
    # a cell stays if all of it is white
    pixels = numpy.asarray(mask.convert("L").resize((width * 8, height * 8), Image.Resampling.NEAREST)) >= 128
    cells = torch.from_numpy(pixels.reshape(height, 8, width, 8).all(axis=(1, 3)))
    if cells.all() or not cells.any():
        raise ValueError("the mask must leave something to keep (white) and something to draw (black)")
    count = int(cells.sum())
    raster = bool(cells.flatten()[:count].all())
    left = bool((cells == cells[:1]).all()) and bool(cells[0, : int(cells[0].sum())].all())
    if not (raster or left):
        raise ValueError(
            "this mask cannot be completed: a picture is drawn row by row from the top left, so what stays must be "
            "its top or its left part"
        )
    return cells


def check_describes(model: ConfiguredModel) -> str:
    """How the model describes pictures, "tagged" or "untagged". Raises `ModelError` for one that only draws."""
    kind = model.config.describes
    if kind == "no":
        raise ModelError(f"{model.source} only draws: it was not trained to describe pictures")
    return kind
