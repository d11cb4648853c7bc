"""The page of the demo, once in each language, and the server that shows it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr

from data.reading import open_shards
from mmwudao.demo import tabs
from mmwudao.demo.actions import KEPT_FOR, LIMITS, Actions
from mmwudao.demo.library import SAMPLES, Library, given_collection, sample_collection
from mmwudao.demo.page import Page
from mmwudao.demo.words import WORDS, Language
from mmwudao.pipeline import Pipeline
from retrieval.photos.places import read_place

WAITING = 32  # events that wait for the model; beyond, Gradio says that the queue is full

# no fonts from elsewhere: Gradio's themes name some of Google's
FONTS = ("system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif")
THEME = gr.themes.Soft(
    primary_hue="teal", secondary_hue="teal", neutral_hue="stone", font=FONTS, font_mono=("ui-monospace", "monospace")
).set(
    body_background_fill="*neutral_100",
    background_fill_primary="white",
    block_title_background_fill="transparent",
    block_title_padding="0",
    block_title_text_color="*body_text_color",
    block_label_background_fill="transparent",
    block_label_text_color="*body_text_color",
)
CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


@contextmanager
def opened(
    pipeline: Pipeline, collection: str | None = None, shards: str | None = None, added: Path | None = None
) -> Iterator[Actions]:
    """The actions of a demo, in a temporary folder that is removed afterwards: uploads, results, sample collection.

    Pictures that visitors add to `collection` are kept in the folder `added`, those for the samples are not.
    Raises `ValueError` for a collection that cannot be searched with the model's towers.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="mmwudao-demo-")))
        # Gradio's cache; it serves no other files
        os.environ["GRADIO_TEMP_DIR"] = str(folder / "cache")
        library = None
        if "towers" in pipeline.config.parts:
            if collection is None:
                items, added = sample_collection(pipeline.towers, folder), folder / "added"
            else:
                items, added = given_collection(pipeline.towers, collection), added or folder / "added"
            stack.callback(items.close)
            library = Library(items, pipeline.towers, added, shards, read_place(collection) if collection else None)
        elif collection is not None:
            raise ValueError(f"{pipeline.source} has no towers to search a collection with: give another --model")
        yield Actions(pipeline, library, folder / "cache" / "results")


def build_page(actions: Actions, language: Language) -> gr.Blocks:
    """The pages: `language` at /, the other at its code."""
    examples = example_pictures(Path(os.environ["GRADIO_TEMP_DIR"]) / "examples")
    other: Language = "zh" if language == "en" else "en"

    def left(request: gr.Request | None) -> None:
        if request is not None:  # it is None when the server ends
            actions.stop(request.session_hash or "")

    with gr.Blocks(analytics_enabled=False, title="mmwudao", delete_cache=(KEPT_FOR // 4, KEPT_FOR)) as demo:
        _page(Page(WORDS[language], actions, examples), WORDS[language].name)
    with demo.route(WORDS[other].name, f"/{other}"):
        _page(Page(WORDS[other], actions, examples), WORDS[language].name)
    with demo:
        demo.unload(left)
    return demo.queue(max_size=WAITING, default_concurrency_limit=1)


def start(demo: gr.Blocks, host: str, port: int, share: bool = False) -> str:
    """Serve in threads of its own; returns the address. Raises `OSError` for a port that is taken."""
    _, local, public = demo.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=LIMITS.max_body,
        theme=THEME,
        css=CSS,
    )
    return public or local


def example_pictures(folder: Path) -> dict[str, Path]:
    """The sample pictures that the examples name, as files in `folder`; none where they are not installed."""
    if not SAMPLES.is_dir():
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split in ("train", "test-concept"):
        for sample, _ in open_shards(SAMPLES, split):
            if sample.id in {*tabs.EXAMPLES, *tabs.COMPLETED}:
                paths[sample.id] = folder / f"{sample.id}.{sample.extension}"
                paths[sample.id].write_bytes(sample.require_image())
    return paths


def _page(page: Page, main_page: str) -> None:
    words, actions = page.words, page.actions
    config = actions.pipeline.config
    gr.Navbar(main_page_name=main_page)
    gr.Markdown(f"# mmwudao\n{words.lead.format(model=config.name)}", elem_classes="head")
    with gr.Tabs():
        with gr.Tab(words.draw, id="draw"):
            tabs.draw_tab(page)
        if actions.library is not None:
            with gr.Tab(words.search, id="search"):
                tabs.search_tab(page)
        if config.describes != "no":
            with gr.Tab(words.caption, id="caption"):
                tabs.caption_tab(page)
        if config.answers and config.languages:
            with gr.Tab(words.ask, id="ask"):
                tabs.ask_tab(page)
        with gr.Tab(words.complete, id="complete"):
            tabs.complete_tab(page)
        if "upscaler" in config.parts:
            with gr.Tab(words.upscale, id="upscale"):
                tabs.upscale_tab(page)
