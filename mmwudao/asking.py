"""Questions about a picture, answered by a loaded model; `mmwudao.pipeline.Pipeline.ask` is the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from data.characters import is_blank
from data.styles import guess_language, tagged
from generation.answers import answer, answer_log_probabilities
from generation.captions import OnStep
from generation.rows.prompt import Prompt
from mmwudao.loading.loaded import LoadedModel
from mmwudao.planning import check_prompt
from mmwudao.tasks import ConfiguredModel, encode_pictures, picture_vectors
from vqvae.storage.parts import ModelError

MAX_ANSWERS = 1000  # to choose from
COMMANDS = 5  # [SIZE] [BOI1] [EOI1] [ROI1] [SEP]
ANSWER_BEAMS = 4


@dataclass(frozen=True)
class Answer:
    """What a model answers, in the language that it read the question in, and how likely that is to it (0 to 1).

    `read` and `written` count tokens: those before the answer, the picture's codes among them, and the answer's own.
    """

    text: str
    language: str
    probability: float
    read: int
    written: int


@dataclass(frozen=True)
class Asking:
    """What to ask about a picture.

    Without `language` it is guessed from each question; the model's first takes the place of a guess that it does not
    know. With `among`, the likeliest of these is the answer; otherwise answers have at most `max_pieces` pieces.
    """

    questions: tuple[str, ...]
    language: str | None = None
    among: tuple[str, ...] = ()
    max_pieces: int | None = None


def ask_picture(model: LoadedModel, image: Image.Image, asking: Asking, on_step: OnStep | None = None) -> list[Answer]:
    """The likeliest answer to each question about the picture (its centre square).

    The probability of one of `asking.among` is that among them. `on_step` is called before every step: an exception it
    raises ends this. Raises as `check_asking` does.
    """
    languages = check_asking(model, asking)
    (codes,), vector = encode_pictures(model, [image], on_step), picture_vectors(model, [image])
    found = []
    for question in asking.questions:
        guess = asking.language or guess_language(question)
        language = guess if guess in languages else languages[0]
        pieces = tuple(model.text.encode(tagged(question.strip(), language)))
        prompt = Prompt(pieces, vector)
        if asking.among:
            text, probability, written = _choose(model, codes, prompt, asking.among, on_step)
        else:
            most = asking.max_pieces
            best = answer(model.generator, codes, prompt, beams=ANSWER_BEAMS, max_pieces=most, on_step=on_step)[0]
            text, written = model.text.decode(best.pieces).strip(), len(best.pieces) + 1
            probability = math.exp(best.log_probability)
        read = codes.numel() + min(len(pieces), model.reads) + COMMANDS
        found.append(Answer(text, language, probability, read, written))
    return found


def _choose(
    model: LoadedModel, codes: Tensor, prompt: Prompt, among: Sequence[str], on_step: OnStep | None
) -> tuple[str, float, int]:
    """The likeliest of the answers, its share of their probability, and its tokens, the end included."""
    spelled = [model.text.encode(text.strip()) for text in among]
    told = answer_log_probabilities(model.generator, codes, prompt, spelled, prompt.features, on_step)
    best = int(told.argmax())
    return among[best].strip(), float(told.softmax(0)[best]), len(spelled[best]) + 1


def check_asking(model: ConfiguredModel, asking: Asking) -> tuple[str, ...]:
    """The languages that the model answers in.

    Raises `ModelError` for a model that does not answer, `ValueError` for no question, an empty or overlong text, too
    many answers to choose from, or a language the model does not know.
    """
    languages = check_answers(model)
    if not asking.questions:
        raise ValueError("no question: ask at least one")
    for what, texts in (("question", asking.questions), ("answer to choose", asking.among)):
        for text in texts:
            if is_blank(text):
                raise ValueError(f"an empty {what}")
            check_prompt(text)
    if len(asking.among) > MAX_ANSWERS:
        raise ValueError(f"{len(asking.among)} answers to choose from: at most {MAX_ANSWERS}")
    if asking.language is not None and asking.language not in languages:
        raise ValueError(f"unknown language {asking.language!r}; this model answers in: {', '.join(languages)}")
    return languages


def check_answers(model: ConfiguredModel) -> tuple[str, ...]:
    """The languages that the model answers in. Raises `ModelError` for one that does not answer."""
    if not model.config.answers:
        raise ModelError(f"{model.source} does not answer questions: it was not trained to")
    if not model.config.languages:
        raise ModelError(f"{model.source} names no language to answer in: assemble it with --languages")
    return model.config.languages
