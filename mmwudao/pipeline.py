"""Text to pictures: load a model directory, draw, draw a remembered picture again, and the other tasks."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.styles import guess_language, with_style
from generation.drawing.decoding import OnToken, count_steps, generate_codes
from generation.drawing.engines import Engine, Kind
from generation.drawing.memory import check_memory, plan_drawing
from generation.drawing.sampling import SamplingOptions
from generation.transformer.adapters import apply_adapter
from generation.transformer.int8 import quantise
from mmwudao import tasks, upscaling
from mmwudao.loading.devices import choose_device, choose_dtype
from mmwudao.loading.loaded import LoadedModel, load_parts
from mmwudao.loading.model_dir import copy_model
from mmwudao.version import __version__
from vqvae.storage.parts import ModelError

MAX_PROMPT = 1000  # characters; what exceeds the model's own text length is cut with a warning
MAX_PICTURES = 1000  # a call


@dataclass(frozen=True)
class Progress:
    """How far a call is: `done` of `total` steps, `rows` of codes, and a way to look at the pictures so far.

    A step draws one code in each picture of a block; blocks of pictures are drawn one after the other.
    """

    done: int
    total: int
    rows: int
    preview: Callable[[], list[Image.Image]]


@dataclass(frozen=True)
class Drawing:
    """One picture to draw: what `Pipeline.plan` checked. `text` is what the model reads of the prompt."""

    prompt: str
    style: str | None
    text: str
    seed: int
    options: SamplingOptions


def load(
    model: str | Path = "emoji",
    device: str = "auto",
    dtype: str = "auto",
    adapter: str | Path | None = None,
    engine: Kind = "auto",
) -> Pipeline:
    """Load a model by shipped name, folder, or hub id, with the style in the folder `adapter` if there is one.

    `device` is one of `DEVICES`; `dtype` is "auto" or a key of `DTYPES`: what the transformer computes in (the image
    tokenizer is small and stays in float32); "int8" is "auto" with the weights of the blocks rounded to 8 bits.
    `engine` is how a step of drawing is run (`generation.drawing.engines`). Every part is checked against the hashes in
    `config.json`.

    Raises `ValueError` for an unknown or absent device, dtype or engine and for a model the device has no room for,
    `ModelError` (a `ValueError`) for a model that is missing, incomplete or not what its config.json says, and for an
    adapter that is damaged or another model's.
    """
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype("auto" if dtype == "int8" else dtype, chosen_device)
    folder, config, tokenizer, generator, text = load_parts(model)
    # the parts are still the mapped files, which take no memory that others need
    options = config.default_sampling
    plan = plan_drawing(generator.config, tokenizer.config, chosen_dtype, chosen_device.type, options=options)
    check_memory(plan.total, chosen_device, chosen_dtype)
    tokenizer.to(device=chosen_device, dtype=torch.float32)
    generator.to(device=chosen_device, dtype=chosen_dtype)
    style = apply_adapter(generator, Path(adapter), config.parts["generator"].hash) if adapter else None
    if dtype == "int8":
        quantise(generator)
    pipeline = Pipeline(str(model), folder, config, tokenizer, generator, text, style)
    pipeline.engine = Engine(engine)
    pipeline.engine.resolved(generator)
    return pipeline


class Pipeline(LoadedModel):
    """A loaded model at work."""

    engine = Engine()

    def generate(
        self,
        prompt: str | Sequence[str],
        n: int = 1,
        seed: int | None = None,
        style: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        window: int | None = None,
        candidates: int | None = None,
        rerank: tasks.Judge = "caption",
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[Image.Image]:
        """Draw `n` pictures of each prompt, prompt by prompt; `.info` of each is the recipe to draw it again.

        Picture k of the call is drawn with `seed + k`; without `seed`, one is drawn and recorded. What is None is
        taken from the model's defaults. With `candidates`, so many are drawn of each prompt, and the n that show it
        best are returned, best first (`tasks.score_pictures` by `rerank`; `.info["score"]`). `on_progress` is called
        after every step.

        Raises `ValueError` for an empty or overlong prompt, `n` below 1 or beyond `candidates`, an unknown style, bad
        sampling options, or when the device has too little memory left; `ModelError` for candidates of a model that
        cannot judge them.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        drawn = n if candidates is None else candidates
        if not 1 <= n <= drawn or drawn * len(prompts) > MAX_PICTURES:
            raise ValueError(
                f"n must be at least 1, at most the candidates, and one call draws at most {MAX_PICTURES} pictures: "
                f"n is {n}" + ("" if candidates is None else f", candidates {candidates}")
            )
        if candidates is not None:
            tasks.check_judge(self, rerank)
        drawings = self.plan(prompts, drawn, seed, style, temperature, top_k, top_p, guidance, window)
        texts, seeds = [one.text for one in drawings], [one.seed for one in drawings]
        codes = self._draw(texts, seeds, drawings[0].options, on_progress)
        images = self._finished(drawings, codes)
        if candidates is None:
            return images
        kept = []
        for i, one in enumerate(prompts):
            some = slice(i * drawn, (i + 1) * drawn)
            scores = tasks.score_pictures(self, one, images[some], rerank, codes[some])
            for score, image in zip(scores, images[some], strict=True):
                image.info["score"] = score
            kept += sorted(images[some], key=lambda image: -image.info["score"])[:n]
        return kept

    def plan(
        self,
        prompt: str | Sequence[str],
        n: int = 1,
        seed: int | None = None,
        style: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        window: int | None = None,
    ) -> list[Drawing]:
        """What `generate` would draw, checked and not yet drawn, for `draw`. Raises `ValueError` as it does."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("no prompt: say what to draw")
        if not 1 <= n * len(prompts) <= MAX_PICTURES:
            raise ValueError(f"n must be at least 1, and one call draws at most {MAX_PICTURES} pictures: n is {n}")
        texts = [self._text(one, style) for one in prompts]
        seeds = self._seeds(seed, n * len(prompts))
        options = self._options(temperature, top_k, top_p, guidance, window)
        return [
            Drawing(prompts[k // n], style, texts[k // n], one_seed, options) for k, one_seed in enumerate(seeds)
        ]

    def draw(self, drawings: Sequence[Drawing], on_token: OnToken | None = None) -> list[Image.Image]:
        """Draw pictures that may be of different calls of `plan` but share their options; each comes out as alone.

        `on_token` is that of `generate_codes`: an exception it raises stops the drawing.
        """
        assert len({one.options for one in drawings}) == 1, "drawings that share a batch share their options"
        check_memory(self.memory.working, self.device, self.generator.embed.weight.dtype)
        rows = [self.encode_text(one.text) for one in drawings]
        seeds, options = [one.seed for one in drawings], drawings[0].options
        codes = generate_codes(
            self.generator, rows, seeds, options, grid=self.grid, on_token=on_token, engine=self.engine
        )
        return self._finished(drawings, codes)

    def _finished(self, drawings: Sequence[Drawing], codes: Tensor) -> list[Image.Image]:
        images = [self.decode_codes(one) for one in codes]
        for image, one in zip(images, drawings, strict=True):
            image.info.update(self._recipe(one.prompt, one.style, one.text, one.seed, one.options))
        return images

    def caption(
        self,
        images: Sequence[Image.Image],
        language: str | None = None,
        by: tasks.Writer = "auto",
        on_step: Callable[[], None] | None = None,
    ) -> list[str]:
        """See `tasks.caption`."""
        return tasks.caption(self, images, language, by, on_step)

    def rerank(self, prompt: str, images: Sequence[Image.Image], by: tasks.Judge = "caption") -> list[float]:
        """How well each picture shows the prompt: see `tasks.score_pictures`. `ValueError` also for a bad prompt."""
        check_prompt(prompt)
        return tasks.score_pictures(self, prompt, images, by)

    def complete(
        self,
        image: Image.Image,
        prompt: str,
        keep: str | Path | Image.Image = "top:0.5",
        n: int = 1,
        seed: int | None = None,
        style: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        window: int | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[Image.Image]:
        """Keep part of a picture (its centre square; see `tasks.kept_cells`) and draw the rest `n` times.

        What is kept has gone through the image tokenizer. `.info` tells how each was drawn, without being a recipe.
        Raises `ValueError` as `generate` does, and for a `keep` that cannot be completed.
        """
        if not 1 <= n <= MAX_PICTURES:
            raise ValueError(f"n must lie in 1..{MAX_PICTURES}, not {n}")
        text, seeds = self._text(prompt, style), self._seeds(seed, n)
        options = self._options(temperature, top_k, top_p, guidance, window)
        kept = tasks.kept_cells(keep, self.grid).to(self.device)
        given = tasks.encode_pictures(self, [image])[0].masked_fill(~kept, -1)
        codes = self._draw([text] * n, seeds, options, on_progress, given.expand(n, -1, -1))
        images = [self.decode_codes(one) for one in codes]
        for one, drawn_with in zip(images, seeds, strict=True):
            one.info.update(self._recipe(prompt, style, text, drawn_with, options))
            one.info["kept"] = keep if isinstance(keep, str) else "a mask"
        return images

    def upscale(
        self, images: Sequence[Image.Image], prompt: str | None = None, seed: int | None = None
    ) -> list[Image.Image]:
        """See `upscaling.upscale`; CogView draws picture k with `seed + k`."""
        if prompt is not None:
            check_prompt(prompt)
        return upscaling.upscale(self, images, prompt, self._seeds(seed, len(images)))

    def redraw(self, recipe: dict[str, Any], on_progress: Callable[[Progress], None] | None = None) -> Image.Image:
        """The picture of a recipe (see `pictures.read_recipe`) again: the same pixels on the same device and dtype.

        Raises `ModelError` when the recipe is another model's or another adapter's.
        """
        if recipe["model_hash"] != self.config.model_hash:
            raise ModelError(
                f"the picture was drawn by another model: its hash is {recipe['model_hash'][:12]}, "
                f"that of {self.source} is {self.config.model_hash[:12]}"
            )
        self._check_adapter(recipe.get("adapter_hash"))
        options = SamplingOptions(**{name: recipe[name] for name in asdict(SamplingOptions()) if name in recipe})
        image = self.decode_codes(self._draw([recipe["text"]], [recipe["seed"]], options, on_progress)[0])
        image.info.update(
            self._recipe(recipe["prompt"], recipe.get("style"), recipe["text"], recipe["seed"], options)
        )
        return image

    def save(self, folder: Path | str) -> Path:
        """Copy the model to the new directory `folder`. Raises `DataError` when it is in use."""
        return copy_model(self.folder, folder)

    def _text(self, prompt: str, style: str | None) -> str:
        """What the model reads of a prompt: the style is named in the prompt's language."""
        check_prompt(prompt)
        if style is not None and style not in self.config.styles:
            raise ValueError(f"unknown style {style!r}; this model knows: {', '.join(self.config.styles) or 'none'}")
        return with_style(prompt, style, guess_language(prompt)) if style else prompt

    def _seeds(self, seed: int | None, count: int) -> list[int]:
        if seed is None:
            seed = secrets.randbelow(2**31)
        if not 0 <= seed < 2**63 - count:
            raise ValueError(f"the seed must lie in 0..{2**63 - count - 1}, not {seed}")
        return list(range(seed, seed + count))

    def _options(
        self,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        guidance: float | None,
        window: int | None,
    ) -> SamplingOptions:
        given: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
        given["window"] = window
        return replace(self.config.default_sampling, **{k: v for k, v in given.items() if v is not None})

    def _draw(
        self,
        texts: list[str],
        seeds: list[int],
        options: SamplingOptions,
        on_progress: Callable[[Progress], None] | None,
        given_codes: Tensor | None = None,
    ) -> Tensor:
        """Codes [n, h, w] of a text and a seed each."""
        check_memory(self.memory.working, self.device, self.generator.embed.weight.dtype)
        rows = [self.encode_text(text) for text in texts]
        prefix = 0
        if given_codes is not None:
            prefix = int((given_codes >= 0).flatten(1).all(dim=0).int().cumprod(dim=0).sum())
        total = count_steps(len(rows), options, self.grid, prefix, self.memory.rows)

        def report(step: int, codes: Tensor) -> None:
            if on_progress is not None:
                rows_done = (prefix + step) // self.grid[1]
                on_progress(Progress(step, total, rows_done, lambda: self.decode_partial(codes)))

        return generate_codes(
            self.generator, rows, seeds, options, grid=self.grid, given_codes=given_codes, on_token=report,
            engine=self.engine,
        )  # fmt: skip

    def decode_partial(self, codes: Tensor) -> list[Image.Image]:
        """Codes so far [n, h, w], -1 where none is drawn, to pictures that are white below the last whole row."""
        pictures = []
        for one in codes:
            picture = Image.new("RGB", (self.config.image_size,) * 2, "white")
            rows = int((one >= 0).all(dim=1).sum())
            if rows:
                picture.paste(self.decode_codes(one[:rows]), (0, 0))
            pictures.append(picture)
        return pictures

    def _recipe(
        self, prompt: str, style: str | None, text: str, seed: int, options: SamplingOptions
    ) -> dict[str, Any]:
        recipe: dict[str, Any] = {"prompt": prompt, "style": style, "text": text, "seed": seed, **asdict(options)}
        recipe |= {
            "model": self.source,
            "model_hash": self.config.model_hash,
            "tokenizer_hash": self.config.parts["tokenizer"].hash,
            "device": self.device.type,
            "dtype": self.dtype,
            "version": __version__,
        }
        if self.engine.kind != "auto":
            recipe["engine"] = self.engine.kind
        if self.adapter is not None:
            recipe["adapter_hash"] = self.adapter.hash
        return recipe

    def _check_adapter(self, recorded: str | None) -> None:
        """`ModelError` unless the adapter with that hash, or none, is the one in use."""
        given = self.adapter.hash if self.adapter is not None else None
        if recorded == given:
            return
        if recorded is None:
            raise ModelError("the picture was drawn without an adapter: give none (--adapter)")
        found = f"this one is {given[:12]}" if given else "none was given"
        raise ModelError(f"the picture was drawn with the adapter {recorded[:12]}, and {found}: give it with --adapter")


def check_prompt(prompt: str) -> None:
    """`ValueError` for a prompt that is empty, longer than `MAX_PROMPT` characters, or not text."""
    if not prompt.strip():
        raise ValueError("an empty prompt: say what to draw")
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"a prompt of {len(prompt)} characters: at most {MAX_PROMPT} can be read")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid Unicode text (at character {error.start + 1})") from error


