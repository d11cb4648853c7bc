"""From a request to the pictures that are to be drawn, checked. Needs a model's configuration and none of its weights.

The service calls `plan` before a request enters a queue, and on machines that hold no model.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy
import torch
from torch import Tensor

from data.characters import is_blank
from data.styles import guess_language, with_style
from generation.drawing.sampling import SamplingOptions
from mmwudao.loading.model_dir import ModelConfig

MAX_PROMPT = 1000  # characters; what exceeds the model's own text length is cut with a warning
MAX_PICTURES = 1000  # a call

# All options, or only those that differ from the model's defaults; a value of None is the default too.
Sampling = SamplingOptions | Mapping[str, Any] | None


@dataclass(frozen=True)
class Drawing:
    """One picture to draw. `text` is what the model reads: the prompt with the style's phrase.

    `like` is the vector of a picture that takes the place of the prompt's, as `like_text` writes it; the prompt may
    then be empty.
    """

    prompt: str
    style: str | None
    text: str
    seed: int
    options: SamplingOptions
    like: str = ""


def plan(
    config: ModelConfig,
    prompt: str | Sequence[str],
    n: int = 1,
    seed: int | None = None,
    style: str | None = None,
    sampling: Sampling = None,
    like: str = "",
) -> list[Drawing]:
    """`n` drawings of each prompt, prompt by prompt; drawing k has `seed + k`, or a random seed + k.

    Raises `ValueError` for no prompt, a prompt that `check_prompt` refuses, too few or too many pictures, an unknown
    style, a seed out of range, and sampling options that are unknown or out of range. With `like` (see `Drawing`) a
    prompt may be empty, if no style is wanted.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("no prompt: say what to draw")
    if not 1 <= n * len(prompts) <= MAX_PICTURES:
        raise ValueError(f"n must be at least 1, and one call draws at most {MAX_PICTURES} pictures: n is {n}")
    texts = ["" if like and not one and style is None else styled_text(config, one, style) for one in prompts]
    options = choose_sampling(config, sampling)
    return [
        Drawing(prompts[k // n], style, texts[k // n], one_seed, options, like)
        for k, one_seed in enumerate(choose_seeds(seed, n * len(prompts)))
    ]


def like_text(vector: Tensor) -> str:
    """The vector of a picture [1, C] as the recipe of a drawing holds it: float32, base64."""
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()


def like_vector(text: str) -> Tensor:
    """The vector [1, C] that `like_text` wrote. Raises `ValueError` for anything else."""
    try:
        numbers = numpy.frombuffer(base64.b64decode(text, validate=True), "<f4")
    except ValueError as error:
        raise ValueError(f"like holds no vector of a picture: {error}") from error
    return torch.from_numpy(numbers.copy())[None]


def choose_sampling(config: ModelConfig, sampling: Sampling) -> SamplingOptions:
    """The model's defaults with the given options in their place. Raises `ValueError` for a bad name or value."""
    if isinstance(sampling, SamplingOptions):
        return sampling
    given = {name: value for name, value in (sampling or {}).items() if value is not None}
    known = [field.name for field in fields(SamplingOptions)]
    for name in given:
        if name not in known:
            raise ValueError(f"unknown sampling option {name!r}; choose from {', '.join(known)}")
    return replace(config.default_sampling, **given)


def choose_seeds(seed: int | None, count: int) -> list[int]:
    """`seed`, or a random one, and the numbers after it. Raises `ValueError` for a seed out of range."""
    if seed is None:
        seed = secrets.randbelow(2**31)
    if not 0 <= seed < 2**63 - count:
        raise ValueError(f"the seed must lie in 0..{2**63 - count - 1}, not {seed}")
    return list(range(seed, seed + count))


def styled_text(config: ModelConfig, prompt: str, style: str | None) -> str:
    """The prompt with the style named in the prompt's language. Raises `ValueError` for a bad prompt or style."""
    check_prompt(prompt)
    if style is not None and style not in config.styles:
        raise ValueError(f"unknown style {style!r}; this model knows: {', '.join(config.styles) or 'none'}")
    return with_style(prompt, style, guess_language(prompt)) if style else prompt


def check_prompt(prompt: str) -> None:
    """`ValueError` for a prompt of nothing visible, longer than `MAX_PROMPT` characters, or not valid Unicode."""
    if is_blank(prompt):
        raise ValueError("an empty prompt: say what to draw")
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"a prompt of {len(prompt)} characters: at most {MAX_PROMPT} can be read")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid Unicode text (at character {error.start + 1})") from error
