"""The controls of a drawing: one for each option of `SamplingOptions`, and the fields that two tabs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import gradio as gr

from generation.drawing.sampling import SamplingOptions
from mmwudao.demo.actions import MAX_DRAWN
from mmwudao.demo.page import Page
from mmwudao.demo.words import Words
from mmwudao.pipeline import MAX_PROMPT

# The useful part of a wide range, and the step of its slider. Other options from 0 to 1 are sliders too.
SLIDERS = {"guidance": (1.0, 8.0, 0.1), "temperature": (0.0, 2.0, 0.05)}


def sampling_controls(page: Page) -> list[gr.components.Component]:
    """A closed accordion with a control for each option, in the order of the fields, at the model's defaults."""
    defaults = page.actions.pipeline.config.default_sampling
    with gr.Accordion(page.words.fine_tuning, open=False):
        return [
            _control(page.words, field, getattr(defaults, field.name)) for field in dataclasses.fields(SamplingOptions)
        ]


def chosen_sampling(values: Sequence[Any]) -> dict[str, Any]:
    """The values of `sampling_controls` by the names of their options; None is the model's default."""
    return {field.name: value for field, value in zip(dataclasses.fields(SamplingOptions), values, strict=True)}


def sampling_words(words: Words, field: dataclasses.Field[Any]) -> tuple[str, str]:
    """The label and the explanation of an option."""
    plain = field.name.replace("_", " ").capitalize(), field.metadata["help"]
    return words.sampling.get(field.name, plain)


def _control(words: Words, field: dataclasses.Field[Any], value: float) -> gr.components.Component:
    label, info = sampling_words(words, field)
    least, most = field.metadata["least"], field.metadata["most"]
    low, high, step = SLIDERS.get(field.name, (least, most, 0.01))
    if (low, high) == (0, 1) or field.name in SLIDERS:
        # a model's default may lie beyond the useful part
        return gr.Slider(min(low, value), max(high, value), value, step=step, label=label, info=info, buttons=[])
    whole = isinstance(field.default, int)
    return gr.Number(value, minimum=least, maximum=most, precision=0 if whole else None, label=label, info=info)


def prompt_field(words: Words) -> gr.Textbox:
    return gr.Textbox("", label=words.prompt, placeholder=words.prompt_hint, max_lines=3, max_length=MAX_PROMPT)


def style_and_seed(page: Page) -> tuple[gr.Dropdown, gr.Textbox]:
    """In one row: the picture family, "" for any, and the seed as a text, "" for a new one."""
    words = page.words
    choices = [(words.any_style, ""), *((name, name) for name in page.actions.pipeline.config.styles)]
    with gr.Row():
        return (
            gr.Dropdown(choices, value="", label=words.style, min_width=140),
            gr.Textbox("", label=words.seed, placeholder=words.seed_hint, min_width=120),
        )


def count_field(words: Words) -> gr.Slider:
    return gr.Slider(1, MAX_DRAWN, 4, step=1, label=words.count, buttons=[])


def start_and_stop(words: Words, name: str) -> tuple[gr.Button, gr.Button]:
    """Two buttons in one place: the second is there while something is drawn."""
    return gr.Button(name, variant="primary"), gr.Button(
        words.stop, variant="stop", visible=False, elem_classes="stop-drawing"
    )
