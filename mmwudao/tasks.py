"""What a loaded model does besides drawing: describe pictures, choose among them, complete one.

`mmwudao.pipeline.Pipeline` has methods of the same names. Shapes: n pictures of h x w codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from PIL import Image
from torch import Tensor

from data.images import open_image, to_rgb, to_square, to_tensor
from data.sample import DataError
from data.styles import guess_language, tagged
from generation.captions import OnStep, caption_log_probabilities, describe, describe_for_judge
from generation.cogview.sampler import caption_scores
from generation.rows.describe import caption_prompt_row
from generation.rows.prompt import Prompt
from mmwudao.loading.loaded import LoadedModel
from mmwudao.loading.model_dir import ModelConfig
from vqvae.storage.parts import ModelError

COGVIEW_PIECES = 20  # of a caption by CogView's own model, whose text has no end mark; its script draws as many
BEAMS = 4
SCORED_AT_ONCE = 4  # pictures; a caller that no longer wants the scores waits for so many at most

Judge = Literal["caption", "towers", "both"]
Writer = Literal["auto", "generator", "both"]


class ConfiguredModel(Protocol):
    """A model as far as the checks need it: its parts need not be loaded."""

    @property
    def source(self) -> str: ...

    @property
    def config(self) -> ModelConfig: ...


def read_pictures(paths: Sequence[Path], *, alpha: bool = False) -> list[Image.Image]:
    """Decode the pictures; `alpha` keeps transparency.

    Raises `ValueError` naming the first file that is missing or no picture.
    """
    pictures = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"no picture at {path}")
        try:
            pictures.append(open_image(path, alpha=alpha))
        except DataError as error:
            raise ValueError(f"{path}: {error}") from error
    return pictures


def encode_pictures(model: LoadedModel, images: Sequence[Image.Image], on_step: OnStep | None = None) -> Tensor:
    """Codes [n, h, w] of pictures of any size: the centre square of each, at the model's size.

    `on_step` is called before each: an exception it raises ends this.
    """
    if not images:
        raise ValueError("no picture: give at least one")
    size = model.config.image_size
    # one at a time: a batch's convolutions may round differently from a single picture's
    squares = [to_tensor(to_square(to_rgb(image), size))[None].to(model.device) for image in images]
    codes = []
    with torch.inference_mode():
        for square in squares:
            if on_step is not None:
                on_step()
            codes.append(model.tokenizer.encode(square))
    return torch.cat(codes)


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
        known = ", ".join(languages) or "one language, which is not named"
        raise ValueError(f"unknown language {language!r}; this model describes in: {known}")
    tag = model.text.encode(tagged("", language or languages[0]).rstrip()) if kind == "tagged" else []
    captions = []
    for image, codes in zip(images, encode_pictures(model, images, on_step), strict=True):
        vectors = picture_vectors(model, [image])
        start = tag if vectors is None else Prompt(tuple(tag), vectors)
        if able and by != "generator":
            best, _ = describe_for_judge(model.generator, codes, _judge(model, image), start, on_step=on_step)[0]
            captions.append(model.text.decode(best.pieces).strip())
            continue
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


def picture_vectors(model: LoadedModel, images: Sequence[Image.Image]) -> Tensor | None:
    """The vectors [n, C] that the generator reads before it describes the pictures; None if it reads none."""
    if model.features is None or model.generator.config.prompt_features.kind != "both":
        return None
    return torch.cat([model.encode_like(image) for image in images])


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
    model: LoadedModel,
    prompt: str,
    images: Sequence[Image.Image],
    by: Judge = "caption",
    codes: Tensor | None = None,
    on_step: OnStep | None = None,
) -> list[float]:
    """How well each picture shows the prompt, more is better. Scores compare pictures for one prompt, not prompts.

    "caption": the log probability (nats) of the prompt as the picture's description, CogView's post-selection (section
    3.3) by inverse prompting (Zou et al. 2021, arXiv:2103.10685). "towers": the cosine of the two towers. "both": the
    mean of the two, each standardised over the pictures. `codes` [n, h, w] are the pictures' if they are known.
    `on_step` is called before every few pictures: an exception it raises ends this.

    Raises `ValueError` for no picture, `ModelError` for a model that cannot describe, or has no towers.
    """
    check_judge(model, by)
    if not images:
        raise ValueError("no picture: give at least one")
    scores = []
    if by != "towers":
        codes = encode_pictures(model, images, on_step) if codes is None else codes
        language, told = guess_language(prompt), list[float]()
        for some in codes.split(SCORED_AT_ONCE):
            if on_step is not None:
                on_step()
            shown = images[len(told) : len(told) + len(some)]
            told += score_codes(model, prompt, some, language, picture_vectors(model, shown))
        scores.append(torch.tensor(told))
    if by != "caption":
        if on_step is not None:
            on_step()
        scores.append(model.towers.encode_image(list(images)) @ model.towers.encode_text([prompt])[0])
    if len(scores) > 1:
        scores = [(one - one.mean()) / one.std(correction=0).clamp_min(1e-6) for one in scores]
    return torch.stack(scores).mean(dim=0).tolist()


def best_pictures(images: Sequence[Image.Image], scores: Sequence[float]) -> list[Image.Image]:
    """The pictures, those with the highest scores first; each score goes into `.info`."""
    for score, image in zip(scores, images, strict=True):
        image.info["score"] = score
    return sorted(images, key=lambda image: -image.info["score"])


def check_judge(model: ConfiguredModel, by: str) -> None:
    """`ValueError` for an unknown judge, `ModelError` for one that the model is not."""
    if by not in get_args(Judge):
        raise ValueError(f"unknown judge {by!r}; choose from {', '.join(get_args(Judge))}")
    if by != "towers":
        check_describes(model)
    if by != "caption" and "towers" not in model.config.parts:
        raise ModelError(f"{model.source} has no towers to judge pictures by: judge them by caption")


def score_codes(
    model: LoadedModel, prompt: str, codes: Tensor, language: str, vectors: Tensor | None = None
) -> list[float]:
    """Log probability (nats) of the prompt as a description of each picture of `codes` [n, h, w].

    `vectors` [n, C] are those of `picture_vectors`.
    """
    kind = check_describes(model)
    if kind == "tagged":
        start = model.text.encode(tagged("", language).rstrip())
        text = model.text.encode(tagged(prompt, language))
        # the tag is spelled alike with and without a text behind it, or it would not be what was learned
        common = next((i for i, (a, b) in enumerate(zip(start, text, strict=False)) if a != b), len(start))
        return caption_log_probabilities(model.generator, codes, text, common, vectors).tolist()
    text = model.text.encode(prompt)[: model.generator.config.max_text]
    rows = [caption_prompt_row(model.generator.config.vocabulary, one, text) for one in codes.cpu()]
    return caption_scores(model.generator, torch.tensor(rows)).tolist()


def check_describes(model: ConfiguredModel) -> str:
    """How the model describes pictures, "tagged" or "untagged".

    Raises `ModelError` for one that only draws, and for one that needs a language's tag and names no language.
    """
    kind = model.config.describes
    if kind == "no":
        raise ModelError(f"{model.source} only draws: it was not trained to describe pictures")
    if kind == "tagged" and not model.config.languages:
        raise ModelError(f"{model.source} names no language to describe in: assemble it with --languages")
    return kind
