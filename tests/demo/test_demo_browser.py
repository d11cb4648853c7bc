"""The demo in a real browser: each tab in both languages, by clicks, with every request watched.

With a folder in the environment variable MMWUDAO_SCREENSHOTS, pictures of the pages are written there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from PIL import Image

from mmwudao.demo.words import WORDS, Words
from mmwudao.pictures import read_recipe

if TYPE_CHECKING:
    from playwright import sync_api
else:
    sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOTS = os.environ.get("MMWUDAO_SCREENSHOTS")
SCREENSHOT_WIDTH = 780  # px
PATIENCE = 240_000  # ms, for a page or a model on a busy machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome in PATH"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """The command itself, with the shipped model and the sample pictures; SIGTERM ends it without a trace."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("demo")
    environment = os.environ | {"TMPDIR": str(folder)}
    command = [sys.executable, "-m", "mmwudao", "demo", "--port", str(port), "--dtype", "float32"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert server.stdout is not None
        line = server.stdout.readline().strip()
        assert line == f"http://127.0.0.1:{port}/", (folder / "log").read_text()
        yield line
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert not list(folder.glob("mmwudao-*"))
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


class Visitor:
    """Somebody who reads the page in one language."""

    def __init__(self, page: sync_api.Page, words: Words) -> None:
        self.page, self.words = page, words

    def open(self, tab: str) -> sync_api.Locator:
        """The panel of that tab."""
        tabs = self.page.get_by_role("tab", name=tab, exact=True)
        tabs.click()
        sync_api.expect(tabs).to_have_attribute("aria-selected", "true")
        return self.page.get_by_role("tabpanel").locator("visible=true")

    def message(self, text: str) -> None:
        """An error is shown in these words; close it."""
        toast = self.page.get_by_test_id("toast-body").filter(has_text=text)
        sync_api.expect(toast).to_be_visible()
        toast.get_by_test_id("toast-close").click()
        sync_api.expect(toast).to_be_hidden()

    def download(self, panel: sync_api.Locator, folder: Path) -> Path:
        """What the download button gives."""
        with self.page.expect_download() as caught:
            panel.get_by_role("link", name=self.words.download).or_(
                panel.get_by_role("button", name=self.words.download, exact=True)
            ).first.click()
        path = folder / caught.value.suggested_filename
        caught.value.save_as(path)
        return path

    def screenshot(self, name: str) -> None:
        """Into the folder for screenshots, if there is one, with the colours that a small file needs."""
        if not SCREENSHOTS:
            return
        path = Path(SCREENSHOTS) / f"demo-{name}-{self.words.language}.png"
        self.page.mouse.move(0, 0)
        self.page.wait_for_timeout(500)  # transitions
        self.page.screenshot(path=path, full_page=True)
        with Image.open(path) as image:
            size = (SCREENSHOT_WIDTH, round(SCREENSHOT_WIDTH * image.height / image.width))
            small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        small.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


@pytest.fixture(params=["en", "zh"])
def visitor(request, address, browser) -> Iterator[Visitor]:
    words = WORDS[request.param]
    context = browser.new_context(
        locale={"en": "en-GB", "zh": "zh-CN"}[words.language], viewport={"width": 1100, "height": 720}
    )
    context.set_default_timeout(PATIENCE)
    sync_api.expect.set_options(timeout=PATIENCE)
    page = context.new_page()
    asked, problems = set(), []
    page.on("request", lambda request: asked.add(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    with page.expect_request("**/heartbeat/**"):  # sent once the page is ready for clicks
        page.goto(address)
    if words.language != "en":
        with page.expect_request("**/heartbeat/**"):
            page.get_by_role("link", name=words.name).or_(page.get_by_role("button", name=words.name)).first.click()
        page.wait_for_url("**/zh**")
    sync_api.expect(page.get_by_role("tab", name=words.draw, exact=True)).to_be_visible()
    yield Visitor(page, words)
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    context.close()
    assert hosts == {urlsplit(address).netloc}, "the page asks for nothing from elsewhere"
    assert not problems


def test_draw(visitor: Visitor, tmp_path: Path) -> None:
    words = visitor.words
    panel = visitor.open(words.draw)
    prompt, style = words.draw_examples[0]
    panel.get_by_text(f"{prompt} · {style}").click()
    sync_api.expect(panel.get_by_label(words.prompt, exact=True)).to_have_value(prompt)
    panel.get_by_label(words.seed, exact=True).fill("7")
    panel.get_by_role("button", name=words.draw, exact=True).click()
    sync_api.expect(panel.locator(".live img")).to_have_count(8)
    sync_api.expect(panel.locator(".live p")).to_contain_text(re.compile(r"[3-9]\d ?%"))
    visitor.screenshot("drawing")
    sync_api.expect(panel.locator(".grid-container img")).to_have_count(4)
    assert panel.locator(".live").is_hidden()
    sync_api.expect(panel.get_by_role("button", name=words.draw, exact=True)).to_be_visible()
    visitor.screenshot("draw")
    with zipfile.ZipFile(visitor.download(panel, tmp_path)) as archive:
        archive.extractall(tmp_path)
    pictures = sorted(tmp_path.glob("*.png"))
    recipes = [read_recipe(path) for path in pictures]
    assert len(recipes) == 4
    assert {(recipe["prompt"], recipe["style"]) for recipe in recipes} == {(prompt, style)}
    assert {recipe["seed"] for recipe in recipes} < set(range(7, 15))
    if words.language == "zh":
        command = [sys.executable, "-m", "mmwudao", "replay", str(pictures[0])]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stdout + done.stderr


def test_one_picture_and_its_own_file(visitor: Visitor, tmp_path: Path) -> None:
    """Enter starts; one picture is downloaded as it is."""
    words = visitor.words
    panel = visitor.open(words.draw)
    for slider in range(2):  # how many, and of how many candidates
        panel.get_by_role("spinbutton").nth(slider).fill("1")
    panel.get_by_label(words.prompt, exact=True).fill("红心")
    panel.get_by_label(words.prompt, exact=True).press("Enter")
    sync_api.expect(panel.locator(".grid-container img")).to_have_count(1)
    path = visitor.download(panel, tmp_path)
    assert path.suffix == ".png"
    assert read_recipe(path)["prompt"] == "红心"


def test_stop(visitor: Visitor) -> None:
    words = visitor.words
    panel = visitor.open(words.draw)
    panel.get_by_label(words.prompt, exact=True).fill("a red apple")
    panel.get_by_role("button", name=words.draw, exact=True).click()
    panel.get_by_role("button", name=words.stop, exact=True).click()
    sync_api.expect(panel.get_by_text(words.stopped, exact=True)).to_be_visible()
    sync_api.expect(panel.get_by_role("button", name=words.draw, exact=True)).to_be_visible()


def test_search_and_add(visitor: Visitor, tmp_path: Path) -> None:
    words = visitor.words
    panel = visitor.open(words.search)
    panel.get_by_text(words.search_examples[0], exact=True).click()
    sync_api.expect(panel.get_by_label(words.look_for, exact=True)).to_have_value(words.search_examples[0])
    panel.get_by_role("button", name=words.search, exact=True).click()
    sync_api.expect(panel.locator(".grid-container img")).to_have_count(12)
    visitor.screenshot("search")
    with zipfile.ZipFile(visitor.download(panel, tmp_path)) as archive:
        records = json.loads(archive.read("results.json"))
        assert {record["file"] for record in records} | {"results.json"} == set(archive.namelist())
    assert len(records) == 12
    panel.get_by_role("button", name=words.add_title).click()
    sync_api.expect(panel.get_by_role("button", name=words.add, exact=True)).to_be_visible()
    own = tmp_path / "own.png"
    Image.new("RGB", (40, 40), (200, 0, 200)).save(own)
    panel.locator("input[type=file]").last.set_input_files(own)
    panel.get_by_label(words.add_description, exact=True).fill("ein lila Quadrat")
    sync_api.expect(panel.locator("img[src*='own']")).to_be_visible()
    panel.get_by_role("button", name=words.add, exact=True).click()
    sync_api.expect(panel.get_by_text(words.added.format(count=300))).to_be_visible()
    panel.get_by_label(words.family, exact=True).click()
    panel.get_by_role("option", name=words.own_family).click()
    panel.get_by_role("button", name=words.search, exact=True).click()
    sync_api.expect(panel.locator(".grid-container img")).to_have_count(1)
    sync_api.expect(panel.get_by_text("ein lila Quadrat", exact=True)).to_be_visible()


def test_search_by_picture(visitor: Visitor, tmp_path: Path) -> None:
    words = visitor.words
    panel = visitor.open(words.search)
    circle = tmp_path / "circle.png"
    Image.new("RGB", (64, 64), "orange").save(circle)
    panel.locator("input[type=file]").first.set_input_files(circle)
    sync_api.expect(panel.locator("img[src*='circle']")).to_be_visible()
    panel.get_by_role("button", name=words.search, exact=True).click()
    sync_api.expect(panel.locator(".grid-container img")).to_have_count(12)


def test_caption(visitor: Visitor, tmp_path: Path) -> None:
    words = visitor.words
    panel = visitor.open(words.caption)
    panel.locator("button.gallery-item").first.click()
    sync_api.expect(panel.locator(".image-frame img")).to_be_visible()
    panel.get_by_role("button", name=words.describe, exact=True).click()
    sync_api.expect(panel.get_by_text(words.described.format(count=7))).to_be_visible()
    visitor.screenshot("caption")
    told = json.loads(visitor.download(panel, tmp_path).read_text(encoding="utf-8"))["captions"]
    assert list(told) == ["zh", "en", "fr", "de", "cs", "ja", "ko"]
    for language, caption in told.items():
        assert caption
        assert panel.locator(f"td[lang={language}]").inner_text() == caption


def test_complete(visitor: Visitor, tmp_path: Path) -> None:
    words = visitor.words
    panel = visitor.open(words.complete)
    panel.locator("button.gallery-item").nth(1).click()
    sync_api.expect(panel.locator(".image-frame img")).to_be_visible()
    sync_api.expect(panel.get_by_label(words.prompt, exact=True)).to_have_value(words.complete_examples[1])
    panel.get_by_role("button", name=words.complete, exact=True).click()
    sync_api.expect(panel.locator(".live img")).to_have_count(4)
    sync_api.expect(panel.locator(".grid-container img")).to_have_count(4)
    visitor.screenshot("complete")
    with zipfile.ZipFile(visitor.download(panel, tmp_path)) as archive:
        archive.extractall(tmp_path)
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert (image.info["prompt"], image.info["kept"]) == (words.complete_examples[1], "top:0.5")


def test_upscale(visitor: Visitor, tmp_path: Path) -> None:
    words = visitor.words
    panel = visitor.open(words.upscale)
    panel.locator("button.gallery-item").nth(2).click()
    sync_api.expect(panel.locator(".image-frame img")).to_be_visible()
    panel.get_by_role("button", name=words.enlarge, exact=True).click()
    sync_api.expect(panel.get_by_text("128×128 → 256×256")).to_be_visible()
    visitor.screenshot("upscale")
    with Image.open(visitor.download(panel, tmp_path)) as image:
        image.load()
        assert image.size == (256, 256)
        assert image.info["model"] == "emoji"


def test_errors_are_messages(visitor: Visitor, tmp_path: Path) -> None:
    words = visitor.words
    panel = visitor.open(words.draw)
    panel.get_by_role("button", name=words.draw, exact=True).click()
    visitor.page.get_by_test_id("toast-body").wait_for()
    visitor.screenshot("error")
    visitor.message(words.refusals["no_prompt"])
    panel.get_by_label(words.prompt, exact=True).fill("<b>x</b>")
    panel.get_by_label(words.seed, exact=True).fill("<i>seven</i>")
    panel.get_by_role("button", name=words.draw, exact=True).click()
    visitor.message("a seed is a whole number such as 7, not '<i>seven</i>'")
    sync_api.expect(panel.get_by_role("button", name=words.draw, exact=True)).to_be_visible()
    panel = visitor.open(words.search)
    panel.get_by_role("button", name=words.search, exact=True).click()
    visitor.message(words.refusals["one_query"])
    panel.get_by_label(words.look_for, exact=True).fill("x")
    panel.get_by_role("button", name=words.where).click()
    panel.get_by_role("textbox").nth(1).fill("colour = 1")
    panel.get_by_role("button", name=words.search, exact=True).click()
    visitor.message("no column 'colour'")
    panel = visitor.open(words.caption)
    panel.get_by_role("button", name=words.describe, exact=True).click()
    visitor.message(words.refusals["no_picture"])
    panel = visitor.open(words.upscale)
    no_picture = tmp_path / "no-picture.png"
    no_picture.write_bytes(b"not a picture at all")
    panel.locator("input[type=file]").first.set_input_files(no_picture)
    sync_api.expect(panel.locator("img[src*='no-picture']")).to_be_attached()
    panel.get_by_role("button", name=words.enlarge, exact=True).click()
    visitor.message(words.refusals["not_a_picture"])
    visitor.page.wait_for_timeout(500)
