"""What all tabs of the page use: picture fields, events, error messages, previews and results."""

from __future__ import annotations

import base64
import html
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import Dependency
from PIL import Image

from mmwudao.demo.actions import Actions, Preview, Refused, Result, Stopped
from mmwudao.demo.words import Words

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Page:
    """What the tabs of one language need. `examples`: pictures by the ids of their samples."""

    words: Words
    actions: Actions
    examples: dict[str, Path]


def picture_field(words: Words, height: int = 240, label: str | None = None) -> gr.Image:
    """A field for an upload that gives the path of its file: Gradio neither opens the file nor fetches a URL."""
    field = gr.Image(
        label=label or words.picture,
        placeholder=words.drop,
        sources=["upload", "clipboard"],
        type="filepath",
        image_mode=None,
        height=height,
        buttons=[],
    )
    keep = field.async_move_resource_to_block_cache

    async def keep_upload(place: str | Path | None) -> str | None:
        if str(place).startswith(("http://", "https://")):
            raise gr.Error("pictures are uploaded, not fetched", print_exception=False)
        return await keep(place)

    # set on the object: for a class derived from a component, Gradio writes a stub file beside our source
    field.preprocess = lambda payload: payload.path if payload else None  # type: ignore[method-assign]
    field.async_move_resource_to_block_cache = keep_upload  # type: ignore[method-assign, assignment]
    return field


def picture_examples(page: Page, rows: Sequence[Sequence[str]], inputs: Sequence[gr.components.Component]) -> None:
    """Examples whose first column is the id of a sample picture, where the sample pictures are installed."""
    known = [[str(page.examples[row[0]]), *row[1:]] for row in rows if row[0] in page.examples]
    if known:
        gr.Examples(known, list(inputs), label=page.words.examples, visible_columns=[0], api_visibility="private")


# on a narrow screen the results are below the fields: go there, once something has been given
GO_TO_RESULTS = """(...given) => {
  const results = [...document.querySelectorAll(".outcome")].find((one) => one.offsetParent);
  if (innerWidth > 720 || !results || !given.some((one) => one && (one.trim ? one.trim() : true))) return;
  document.activeElement?.blur();
  results.scrollIntoView({ block: "start" });
}"""


def outcome() -> gr.Column:
    """The right column of a tab, which is the lower one on a narrow screen."""
    return gr.Column(scale=6, min_width=320, elem_classes="outcome")


def on_model(
    trigger: Callable[..., Dependency],
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    given: Sequence[Any] = (),
) -> Dependency:
    """Call `fn` after a click or Enter: one such event at a time in the whole server, in the order of arrival.

    If one of the fields `given` is filled in, a narrow screen moves on to the results.
    """
    if given:
        trigger(None, list(given), None, js=GO_TO_RESULTS, queue=False, api_visibility="private")
    return trigger(
        fn,
        list(inputs),
        list(outputs),
        concurrency_id="model",
        concurrency_limit=1,
        show_progress="minimal",
        show_progress_on=outputs[0],
        api_visibility="private",
    )


@contextmanager
def errors_as_messages(words: Words) -> Iterator[None]:
    """Show the user's mistake in one line. Any other error is logged, and the page only says that there was one."""
    try:
        yield
    except Refused as error:
        message = words.refusals[error.reason]
    except ValueError as error:
        message = " ".join(str(error).split())
    except Exception:
        log.exception("the demo failed")
        message = words.refusals["failed"]
    else:
        return
    # Gradio renders messages as HTML
    raise gr.Error(html.escape(message), print_exception=False)


@dataclass(frozen=True)
class DrawingOutputs:
    """The components that show a drawing; `all` is the order in which `show_drawing` updates them."""

    live: gr.HTML
    gallery: gr.Gallery
    note: gr.Markdown
    download: gr.DownloadButton
    start: gr.Button
    stop: gr.Button

    @property
    def all(self) -> list[Any]:
        return [self.live, self.gallery, self.note, self.download, self.start, self.stop]


def drawing_outputs(words: Words, start: gr.Button, stop: gr.Button) -> DrawingOutputs:
    """The right column of a tab that draws."""
    live = gr.HTML(empty_html(4), elem_classes="live")
    gallery = results_gallery(words, 2)
    note = gr.Markdown()
    return DrawingOutputs(live, gallery, note, gr.DownloadButton(words.download, visible=False), start, stop)


def results_gallery(words: Words, columns: int) -> gr.Gallery:
    """Hidden until there are results."""
    return gr.Gallery(
        label=words.results,
        show_label=False,
        columns=columns,
        object_fit="contain",
        height="auto",
        buttons=["download", "fullscreen"],
        interactive=False,
        visible=False,
        elem_classes="results",
    )


def show_drawing(words: Words, updates: Iterator[Preview | Result], told: str) -> Iterator[list[Any]]:
    """Updates of `DrawingOutputs.all` for each update of a drawing; `told` is the note at the end."""
    hidden, shown = gr.update(visible=False), gr.update(visible=True)
    with errors_as_messages(words):
        try:
            for update in updates:
                if isinstance(update, Preview):
                    text = words.drawing.format(percent=round(100 * update.share))
                    live = gr.update(value=preview_html(update.pictures, update.share, text), visible=True)
                    yield [live, hidden, "", hidden, hidden, shown]
                else:
                    count = len(update.pictures)
                    pictures = [
                        (str(path), _label(words, info))
                        for path, info in zip(update.pictures, update.infos, strict=True)
                    ]
                    gallery = gr.update(value=pictures, columns=columns_of(count), visible=True)
                    file = gr.update(value=str(update.download), visible=True)
                    note = told.format(count=count)
                    if update.read is not None:
                        note += "\n\n" + words.cut.format(read=html.escape(update.read[-60:]))
                    yield [hidden, gallery, note, file, shown, hidden]
        except Stopped:
            yield [gr.skip(), gr.skip(), words.stopped, gr.skip(), shown, hidden]


def connect_drawing(
    page: Page,
    triggers: Sequence[Callable[..., Dependency]],
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: DrawingOutputs,
    prompt: gr.Textbox,
) -> None:
    """Start on any of `triggers`, stop on the stop button; after an error the start button is shown again."""

    def stop(request: gr.Request) -> None:
        page.actions.stop(request.session_hash or "")

    for trigger in triggers:
        ended = on_model(trigger, fn, inputs, outputs.all, [prompt])
        ended.then(
            lambda: [gr.update(visible=True), gr.update(visible=False)],
            None,
            [outputs.start, outputs.stop],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
    outputs.stop.click(stop, None, None, queue=False, api_visibility="private")


def preview_html(pictures: Sequence[Image.Image], share: float, text: str) -> str:
    """Pictures side by side above a bar; data URIs, so that nothing flickers."""
    tiles = _tiles([f'<img alt="" src="{_data_uri(one)}">' for one in pictures])
    bar = f'<div class="bar"><div style="width: {100 * share:.0f}%"></div></div>'
    return f"{tiles}{bar}<p>{html.escape(text)}</p>"


def empty_html(count: int) -> str:
    """The squares where pictures will be."""
    return _tiles(["<span></span>"] * count)


def columns_of(count: int) -> int:
    """How many of so many pictures stand side by side."""
    return 1 if count == 1 else 2 if count <= 4 else 4


def _tiles(tiles: Sequence[str]) -> str:
    return f'<div class="tiles" style="--columns:{columns_of(len(tiles))}">{"".join(tiles)}</div>'


def _label(words: Words, info: dict[str, Any]) -> str:
    score = f" · {info['score']:.1f}" if "score" in info else ""
    return f"{words.seed} {info['seed']}{score}"


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
