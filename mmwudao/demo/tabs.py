"""The tabs: fields on the left, results on the right."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from typing import Any

import gradio as gr

from mmwudao.asking import Answer
from mmwudao.demo.actions import MAX_CANDIDATES, MAX_FOUND, Result, read_seed
from mmwudao.demo.controls import (
    chosen_sampling,
    count_field,
    prompt_field,
    sampling_controls,
    start_and_stop,
    style_and_seed,
)
from mmwudao.demo.library import OWN
from mmwudao.demo.page import (
    Page,
    connect_drawing,
    drawing_outputs,
    empty_html,
    errors_as_messages,
    on_model,
    outcome,
    picture_examples,
    picture_field,
    results_gallery,
    show_drawing,
)
from mmwudao.demo.words import LANGUAGE_NAMES, Words
from mmwudao.pipeline import MAX_PROMPT

COMPLETED = ("noto-v1-1f604", "noto-v1-1f481-200d-2640", "noto-1f7e0")  # as `Words.complete_examples`
EXAMPLES = ("noto-v1-1f98a", "noto-1f354", "fluent-emoji-flat-1f993", "fluent-emoji-1f438")


def draw_tab(page: Page) -> None:
    """Text to pictures."""
    words, actions = page.words, page.actions
    config = actions.pipeline.config
    judges = config.describes != "no" or config.selection.judge == "towers"
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            gr.Markdown(words.draw_lead)
            prompt = prompt_field(words)
            style, seed = style_and_seed(page)
            count = count_field(words)
            candidates = gr.Slider(
                1, MAX_CANDIDATES, 8, step=1, label=words.candidates, info=words.candidates_info, buttons=[],
                visible=judges,
            )  # fmt: skip
            sampling = sampling_controls(page)
            start, stop = start_and_stop(words, words.draw)
            rows = [[text, name if name in config.styles else ""] for text, name in words.draw_examples]
            names = [" · ".join(filter(None, row)) for row in rows]
            gr.Examples(rows, [prompt, style], label=words.examples, example_labels=names, api_visibility="private")
        with outcome():
            outputs = drawing_outputs(words, start, stop)

    def draw(
        prompt: str, style: str, seed: str, n: int, candidates: int, request: gr.Request, *sampling: Any
    ) -> Iterator[list[Any]]:
        with errors_as_messages(words):
            number = read_seed(seed)
        chosen, options = candidates if judges else 0, chosen_sampling(sampling)
        updates = actions.draw(prompt, n, chosen, number, style or None, options, request.session_hash or "")
        yield from show_drawing(words, updates, words.drawn)

    inputs = [prompt, style, seed, count, candidates, *sampling]
    connect_drawing(page, [start.click, prompt.submit], draw, inputs, outputs, prompt)


def search_tab(page: Page) -> None:
    """A text or a picture to the nearest pictures of the library; and pictures of the user's for the library."""
    words, actions = page.words, page.actions
    library = actions.library
    assert library is not None
    families = [(words.all_families, ""), *((name, name) for name in library.families), (words.own_family, OWN)]
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            gr.Markdown(words.search_lead.format(count=library.count()))
            text = gr.Textbox("", label=words.look_for, placeholder=words.look_for_hint, max_lines=3)
            picture = picture_field(words, 180, words.or_picture)
            with gr.Row():
                family = gr.Dropdown(families, value="", label=words.family, min_width=140)
                k = gr.Slider(1, MAX_FOUND, 12, step=1, label=words.how_many, buttons=[], min_width=140)
            with gr.Accordion(words.where, open=False):
                where = gr.Textbox("", show_label=False, info=words.where_info, max_length=2000, container=False)
            start = gr.Button(words.search, variant="primary")
            rows = [[one] for one in words.search_examples]
            gr.Examples(rows, [text], label=words.examples, api_visibility="private")
            if library.can_add:
                _add_fields(page)
        with outcome():
            empty = gr.HTML(empty_html(8), elem_classes="live")
            gallery = results_gallery(words, 4)
            note = gr.Markdown()
            scores = gr.Checkbox(False, label=words.show_scores, visible=False, container=False)
            download = gr.DownloadButton(words.download, visible=False)
    last = gr.State(None)

    def search(text: str, picture: str | None, family: str, where: str, k: int, scores: bool) -> list[Any]:
        with errors_as_messages(words):
            result = actions.search(text, picture, family, where, k)
            return [*_show_found(words, result, scores), result]

    for trigger in (start.click, text.submit):
        inputs = [text, picture, family, where, k, scores]
        on_model(trigger, search, inputs, [empty, gallery, note, scores, download, last], [text, picture])
    scores.change(
        lambda result, scores: gr.update(value=_labelled(words, result, scores)) if result else gr.skip(),
        [last, scores], gallery, queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip


def _labelled(words: Words, result: Result, scores: bool) -> list[tuple[str, str]]:
    """Pictures that were found, with their names and perhaps their scores."""

    def label(info: dict[str, Any]) -> str:
        name = _name(info["metadata"], words.language)
        return " · ".join(filter(None, (name, f"{info['score']:.2f}"))) if scores else name

    return [(str(path), label(info)) for path, info in zip(result.pictures, result.infos, strict=True)]


def _show_found(words: Words, result: Result, scores: bool = False) -> list[Any]:
    """Updates of the empty squares, the gallery, the note, the choice of scores and the download."""
    pictures = _labelled(words, result, scores)
    told = words.found.format(count=len(pictures)) if pictures else words.found_nothing
    if pictures and not result.near:
        told = words.nothing_near
    if result.hidden:
        told += " " + words.not_shown.format(count=result.hidden)
    return [
        gr.update(visible=False),
        gr.update(value=pictures, visible=True),
        told,
        gr.update(visible=bool(pictures)),
        gr.update(value=str(result.download), visible=True),
    ]


def _add_fields(page: Page) -> None:
    """A closed accordion with which the user adds a picture to the library."""
    words = page.words
    with gr.Accordion(words.add_title, open=False):
        own = picture_field(words, 180)
        description = gr.Textbox(
            "", label=words.add_description, placeholder=words.add_hint, max_lines=2, max_length=MAX_PROMPT
        )
        add = gr.Button(words.add)
        added = gr.Markdown()

    def store(picture: str | None, description: str) -> list[Any]:
        with errors_as_messages(words):
            return [words.added.format(count=page.actions.add(picture, description)), None, ""]

    on_model(add.click, store, [own, description], [added, own, description])


def caption_tab(page: Page) -> None:
    """A picture to descriptions."""
    words, actions = page.words, page.actions
    # a model with one language may not name it
    languages = [(LANGUAGE_NAMES.get(code, code), code) for code in actions.pipeline.config.languages or [""]]
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            gr.Markdown(words.caption_lead)
            picture = picture_field(words)
            chosen = gr.CheckboxGroup(
                languages, value=[code for _, code in languages], label=words.languages,
                visible=bool(actions.pipeline.config.languages),
            )  # fmt: skip
            start = gr.Button(words.describe, variant="primary")
            picture_examples(page, [[one] for one in EXAMPLES], [picture])
        with outcome():
            table = gr.HTML(_captions_html(dict.fromkeys((code for _, code in languages), "")), elem_classes="captions")
            note = gr.Markdown()
            download = gr.DownloadButton(words.download, visible=False)

    def caption(picture: str | None, chosen: list[str]) -> Iterator[list[Any]]:
        with errors_as_messages(words):
            for captions in actions.caption(picture, chosen):
                shown = dict.fromkeys(chosen, "…") | captions.told
                file = gr.update(value=captions.download and str(captions.download), visible=bool(captions.download))
                told = words.described.format(count=len(chosen)) if captions.download else ""
                yield [_captions_html(shown), told, file]

    on_model(start.click, caption, [picture, chosen], [table, note, download], [picture])


def ask_tab(page: Page) -> None:
    """A picture and questions to answers."""
    words, actions = page.words, page.actions
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            gr.Markdown(words.ask_lead)
            picture = picture_field(words)
            asked = gr.Textbox("", label=words.questions, placeholder=words.questions_hint, lines=3, max_lines=8)
            start = gr.Button(words.ask, variant="primary")
        with outcome():
            table = gr.HTML(elem_classes="captions")

    def ask(picture: str | None, text: str) -> str:
        with errors_as_messages(words):
            answers = actions.ask(picture, text)
            questions = [line for line in text.splitlines() if line.strip()]
            return _answers_html(zip(questions, answers, strict=True))

    on_model(start.click, ask, [picture, asked], [table], [picture, asked])


def complete_tab(page: Page) -> None:
    """Part of a picture and a text to the rest of the picture."""
    words, actions = page.words, page.actions
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            gr.Markdown(words.complete_lead)
            picture = picture_field(words)
            prompt = prompt_field(words)
            with gr.Row():
                sides = [(words.keep_top, "top"), (words.keep_left, "left")]
                side = gr.Radio(sides, value="top", label=words.keep, min_width=140)
                share = gr.Slider(0.1, 0.9, 0.5, step=0.05, label=words.share, buttons=[], min_width=140)
            style, seed = style_and_seed(page)
            count = count_field(words)
            sampling = sampling_controls(page)
            start, stop = start_and_stop(words, words.complete)
            rows = list(zip(COMPLETED, words.complete_examples, strict=True))
            picture_examples(page, rows, [picture, prompt])
        with outcome():
            outputs = drawing_outputs(words, start, stop)

    def complete(
        picture: str | None, prompt: str, side: str, share: float, style: str, seed: str, n: int,
        request: gr.Request, *sampling: Any,
    ) -> Iterator[list[Any]]:  # fmt: skip
        with errors_as_messages(words):
            number = read_seed(seed)
        options, session = chosen_sampling(sampling), request.session_hash or ""
        updates = actions.complete(picture, prompt, side, share, n, number, style or None, options, session)
        yield from show_drawing(words, updates, words.completed)

    inputs = [picture, prompt, side, share, style, seed, count, *sampling]
    connect_drawing(page, [start.click, prompt.submit], complete, inputs, outputs, prompt)


def upscale_tab(page: Page) -> None:
    """A picture to a larger one."""
    words, actions = page.words, page.actions
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            gr.Markdown(words.upscale_lead)
            picture = picture_field(words)
            start = gr.Button(words.enlarge, variant="primary")
            picture_examples(page, [[one] for one in EXAMPLES], [picture])
        with outcome():
            empty = gr.HTML(empty_html(1), elem_classes="live")
            both = gr.ImageSlider(
                label=words.before_after, visible=False, interactive=False, buttons=["fullscreen"], max_height=520
            )
            note = gr.Markdown()
            download = gr.DownloadButton(words.download, visible=False)

    def upscale(picture: str | None) -> list[Any]:
        with errors_as_messages(words):
            stretched, result = actions.upscale(picture)
        pair = (str(stretched), str(result.pictures[0]))
        return [
            gr.update(visible=False),
            gr.update(value=pair, visible=True),
            words.enlarged.format(**result.infos[0]),
            gr.update(value=str(result.download), visible=True),
        ]

    on_model(start.click, upscale, [picture], [empty, both, note, download], [picture])


def _name(metadata: dict[str, Any], language: str) -> str:
    """The caption of a picture in the page's language, else in another, else its family."""
    captions = [str(value) for name, value in sorted(metadata.items()) if name.startswith("caption_")]
    known = metadata.get(f"caption_{language}") or metadata.get("text") or (captions[0] if captions else "")
    return str(known or metadata.get("family") or "")


def _captions_html(told: dict[str, str]) -> str:
    rows = "".join(
        f'<tr><th>{html.escape(LANGUAGE_NAMES.get(code, code))}</th><td lang="{code}">{html.escape(text)}</td></tr>'
        for code, text in told.items()
    )
    return f"<table>{rows}</table>"


def _answers_html(answered: Iterable[tuple[str, Answer]]) -> str:
    rows = (
        f'<tr><th>{html.escape(question)}</th><td lang="{one.language}">{html.escape(one.text)}</td></tr>'
        for question, one in answered
    )
    return f"<table>{''.join(rows)}</table>"
