"""Text to pictures: load a model directory, draw, draw a picture again from its recipe, and the other tasks.

    load("emoji").generate("红心", n=4, seed=7, sampling={"temperature": 0.8})

Shapes: n pictures of h x w codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from generation.drawing.decoding import OnToken, count_steps, generate_codes
from generation.drawing.engines import Engine, Kind
from generation.drawing.memory import check_memory, plan_drawing
from generation.drawing.sampling import SamplingOptions
from generation.transformer.adapters import AdapterConfig, apply_adapter
from generation.transformer.int8 import quantise
from mmwudao import planning, tasks, upscaling
from mmwudao.asking import Answer, Asking, ask_picture
from mmwudao.canvas import Canvas, CanvasFormat, extended_canvas, masked_canvas
from mmwudao.loading.devices import choose_device, choose_dtype, choose_expert_memory
from mmwudao.loading.loaded import LoadedModel, ModelParts, load_parts
from mmwudao.loading.model_dir import copy_model
from mmwudao.planning import MAX_PICTURES, MAX_PROMPT, Drawing, Sampling, check_prompt
from mmwudao.version import __version__
from vqvae.storage.parts import ModelError

__all__ = ["MAX_PICTURES", "MAX_PROMPT", "Drawing", "DrawingProgress", "Pipeline", "Sampling", "check_prompt", "load"]


@dataclass(frozen=True)
class DrawingProgress:
    """How far a call is: `done` of `total` steps, `rows` of codes, and a function that decodes the pictures so far.

    A step draws one code in each picture of a block; blocks of pictures are drawn one after the other.
    """

    done: int
    total: int
    rows: int
    preview: Callable[[], list[Image.Image]]


OnProgress = Callable[[DrawingProgress], None]


def load(
    model: str | Path = "emoji",
    device: str = "auto",
    dtype: str = "auto",
    adapter: str | Path | None = None,
    engine: Kind = "auto",
    expert_memory: str | None = None,
) -> Pipeline:
    """Load a model by shipped name, folder, or hub id, with the style in the folder `adapter` if there is one.

    `device` is one of `DEVICES`; `dtype` is "auto" or a key of `DTYPES`: what the transformer computes in (the image
    tokenizer is small and stays in float32); "int8" is "auto" with the weights of the blocks rounded to 8 bits.
    `engine` is how a step of drawing is run (`generation.drawing.engines`). With `expert_memory`, such as "256MB", so
    much of a generator's experts is in memory, and the others stay in its file; for CPUs. Every part is checked against
    the hashes in `config.json`.

    Raises `ValueError` for an unknown or absent device, dtype or engine and for a model the device has no room for,
    `ModelError` (a `ValueError`) for a model that is missing, incomplete or not what its config.json says, and for an
    adapter that is damaged or another model's.
    """
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype("auto" if dtype == "int8" else dtype, chosen_device)
    expert_bytes = choose_expert_memory(expert_memory, chosen_device)
    parts = load_parts(model, expert_bytes, chosen_dtype)
    config, tokenizer, generator = parts.config, parts.tokenizer, parts.generator
    # check now: the parts are still mapped files, which take no memory that others need
    planned = partial(
        plan_drawing, generator.config, tokenizer.config, device=chosen_device.type, options=config.default_sampling,
        encoder=parts.encoder_bytes, expert_memory=expert_bytes,
    )  # fmt: skip
    eight_bits = dtype == "int8" and not adapter

    def others() -> dict[str, int]:
        smaller = {} if chosen_dtype.itemsize < 4 else {"bfloat16": planned(torch.bfloat16).total}
        return smaller if eight_bits else smaller | {"int8": planned(chosen_dtype, eight_bits=True).total}

    check_memory(planned(chosen_dtype, eight_bits=eight_bits).total, chosen_device, chosen_dtype, others)
    tokenizer.to(device=chosen_device, dtype=torch.float32)
    if adapter or dtype != "int8":
        generator.to(device=chosen_device, dtype=chosen_dtype)
    style = apply_adapter(generator, Path(adapter), config.parts["generator"].hash) if adapter else None
    if dtype == "int8":
        quantise(generator, chosen_device, chosen_dtype)
    pipeline = Pipeline(str(model), parts, style, Engine(engine))
    if generator.config.prompt_features.used:
        pipeline.features  # noqa: B018  the towers draw, so they are checked now as the other parts are
    pipeline.prompt_encoder  # noqa: B018  and so is an encoder of prompts
    return pipeline


class Pipeline(LoadedModel):
    """A loaded model that draws, describes, completes and enlarges pictures."""

    def __init__(
        self, source: str, parts: ModelParts, adapter: AdapterConfig | None = None, engine: Engine | None = None
    ) -> None:
        """Raises `ValueError` for an engine that this model or its device cannot use."""
        super().__init__(source, parts, adapter)
        self.engine = engine or Engine()
        self.engine.resolved(self.generator)

    def generate(
        self,
        prompt: str | Sequence[str],
        n: int = 1,
        seed: int | None = None,
        style: str | None = None,
        sampling: Sampling = None,
        *,
        like: Image.Image | None = None,
        candidates: int | None = None,
        rerank: tasks.Judge | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Image.Image]:
        """Draw `n` pictures of each prompt, prompt by prompt; `.info` of each is the recipe to draw it again.

        Picture k of the call is drawn with `seed + k`; without `seed`, one is drawn and recorded. `sampling` replaces
        all of the model's sampling defaults (`SamplingOptions`) or those that it names, as in {"temperature": 0.5}.
        What is drawn is `like` a picture, whose vector takes the place of the prompt's; the prompt may then be "".
        With `candidates`, so many are drawn of each prompt, and the n that show it best are returned, best first
        (`tasks.score_pictures` by `rerank`, or the towers' cosine with `like`; `.info["score"]`); 0 draws n. Without
        them the model's own are used (`Selection`). `on_progress` is called after every step.

        Raises `ValueError` for an empty or overlong prompt, `n` below 1 or beyond `candidates`, an unknown style, bad
        sampling options, or when the device has too little memory left; `ModelError` for candidates of a model that
        cannot judge them, and for `like` with a model that cannot draw from a picture.
        """
        prompts, steps = [prompt] if isinstance(prompt, str) else list(prompt), list[DrawingProgress]()
        candidates, judge = self._count_candidates(n, candidates, len(prompts)), rerank or self.config.selection.judge
        drawn = n if candidates is None else candidates
        if candidates is not None and like is None:
            tasks.check_judge(self, judge)
        vector = None if like is None else self.encode_like(like)
        like_of = "" if vector is None else planning.like_text(vector)
        drawings = planning.plan(self.config, prompts, drawn, seed, style, sampling, like_of)

        def watched(progress: DrawingProgress) -> None:
            steps[:] = [progress]
            if on_progress is not None:
                on_progress(progress)

        codes = self._draw_codes(drawings, watched if on_progress is not None else None)
        images = self._finish(drawings, codes)
        if candidates is None:
            return images
        # told of the last step again, so that who watches can also stop the judging
        again = partial(watched, steps[0]) if steps else None
        kept = []
        for i, one in enumerate(prompts):
            some = slice(i * drawn, (i + 1) * drawn)
            if vector is None:
                scores = tasks.score_pictures(self, one, images[some], judge, codes[some], again)
            else:
                scores = (self.towers.encode_image(images[some]) @ vector[0]).tolist()
            kept += tasks.best_pictures(images[some], scores)[:n]
        return kept

    def _count_candidates(self, n: int, candidates: int | None, prompts: int) -> int | None:
        """How many pictures of each prompt are drawn to choose from; None for no choice. Raises `ValueError`."""
        if candidates is None and self.config.selection.candidates > 1 and n > 0:
            most = MAX_PICTURES // max(1, prompts)
            candidates = max(n, min(n * self.config.selection.candidates, most))
        if not 1 <= n <= (candidates or n) or (candidates or n) * prompts > MAX_PICTURES:
            raise ValueError(
                f"n must be at least 1, at most the candidates, and one call draws at most {MAX_PICTURES} pictures: "
                f"n is {n}" + (f", candidates {candidates}" if candidates else "")
            )
        return candidates or None

    def plan(
        self,
        prompt: str | Sequence[str],
        n: int = 1,
        seed: int | None = None,
        style: str | None = None,
        sampling: Sampling = None,
    ) -> list[Drawing]:
        """What `generate` would draw, checked and not yet drawn, for `draw`. Raises `ValueError` as it does."""
        return planning.plan(self.config, prompt, n, seed, style, sampling)

    def draw(
        self, drawings: Sequence[Drawing], on_token: OnToken | None = None, canvas: Canvas | None = None
    ) -> list[Image.Image]:
        """Draw pictures of one or several calls of `plan` that share their options; each is what it would be alone.

        What they complete is the `canvas`, if there is one. `on_token` is that of `generate_codes`: an exception it
        raises stops the drawing.
        """
        return self._finish(drawings, self._generate_codes(drawings, on_token, canvas), canvas)

    def caption(
        self,
        images: Sequence[Image.Image],
        language: str | None = None,
        by: tasks.Writer = "auto",
        on_step: Callable[[], None] | None = None,
    ) -> list[str]:
        """See `tasks.caption_pictures`."""
        return tasks.caption_pictures(self, images, language, by, on_step)

    def ask(
        self, image: Image.Image, questions: Sequence[str], language: str | None = None, among: Sequence[str] = (),
        *, on_step: Callable[[], None] | None = None,
    ) -> list[Answer]:  # fmt: skip
        """The likeliest answer to each question about a picture: see `asking.ask_picture`."""
        return ask_picture(self, image, Asking(tuple(questions), language, tuple(among)), on_step)

    def rerank(
        self,
        prompt: str,
        images: Sequence[Image.Image],
        by: tasks.Judge = "caption",
        on_step: Callable[[], None] | None = None,
    ) -> list[float]:
        """How well each picture shows the prompt: see `tasks.score_pictures`. `ValueError` also for a bad prompt."""
        check_prompt(prompt)
        return tasks.score_pictures(self, prompt, images, by, on_step=on_step)

    def complete(
        self,
        image: Image.Image,
        prompt: str,
        keep: str | Path | Image.Image = "top:0.5",
        n: int = 1,
        seed: int | None = None,
        style: str | None = None,
        sampling: Sampling = None,
        *,
        extend: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Image.Image]:
        """Keep part of a picture (its centre square; see `masks.find_kept`) and draw the rest `n` times.

        With `extend`, such as `left:0.25`, all of it is kept, and as much as that share of it is drawn at that side. A
        model that was trained to fill holes keeps any part; others, the top or the left. The pixels that are kept are
        the picture's own, but for a seam (`mmwudao.canvas`). `.info` tells how each was drawn, without being a recipe.
        Raises `ValueError` as `generate` does, and for what cannot be completed.
        """
        drawings = self.plan(prompt, n, seed, style, sampling)
        if extend is None:
            canvas = masked_canvas(self.canvas_format, image, keep)
        else:
            canvas = extended_canvas(self.canvas_format, image, extend)
        return self._finish(drawings, self._draw_codes(drawings, on_progress, canvas), canvas)

    @property
    def canvas_format(self) -> CanvasFormat:
        """What a picture to be completed must fit."""
        return CanvasFormat(self.config.image_size, self.grid, self.generator.config.fills)

    def upscale(
        self,
        images: Sequence[Image.Image],
        prompt: str | None = None,
        seed: int | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> list[Image.Image]:
        """See `upscaling.upscale_pictures`; CogView draws picture k with `seed + k`."""
        if prompt is not None:
            check_prompt(prompt)
        return upscaling.upscale_pictures(self, images, prompt, planning.choose_seeds(seed, len(images)), on_step)

    def redraw(self, recipe: dict[str, Any], on_progress: OnProgress | None = None) -> Image.Image:
        """The picture of a recipe (see `pictures.read_recipe`) again: the same pixels on the same device and dtype.

        Raises `ModelError` when the recipe is another model's or another adapter's.
        """
        if recipe["model_hash"] != self.config.model_hash:
            raise ModelError(
                f"the picture was drawn by another model: its hash is {recipe['model_hash'][:12]}, "
                f"that of {self.source} is {self.config.model_hash[:12]}"
            )
        self._check_adapter(recipe.get("adapter_hash"))
        towers = self.config.parts.get("towers")
        if "towers_hash" in recipe and (towers is None or towers.hash != recipe["towers_hash"]):
            raise ModelError(
                f"the picture was drawn with the towers {recipe['towers_hash'][:12]}, and {self.source} has "
                f"{towers.hash[:12] if towers else 'none'}"
            )
        # the default of an option that is younger than the recipe is to leave it out
        names = [field.name for field in fields(SamplingOptions)]
        options = SamplingOptions(**{name: recipe[name] for name in names if name in recipe})
        said = recipe["prompt"], recipe.get("style"), recipe["text"]
        drawing = Drawing(*said, recipe["seed"], options, recipe.get("like", ""))
        return self._finish([drawing], self._draw_codes([drawing], on_progress))[0]

    def save(self, folder: Path | str) -> Path:
        """Copy the model to the new directory `folder`. Raises `DataError` when it is in use."""
        return copy_model(self.folder, folder)

    def decode_partial(self, codes: Tensor, canvas: Canvas | None = None) -> list[Image.Image]:
        """Codes so far [n, h, w], -1 where none is drawn, to pictures that are white below the last whole row.

        Those that complete a `canvas` are white where nothing is drawn.
        """
        if canvas is not None:
            return [canvas.preview(self.decode_codes(one.clamp_min(0)), (one >= 0).cpu()) for one in codes]
        pictures = []
        for one in codes:
            picture = Image.new("RGB", (self.config.image_size,) * 2, "white")
            rows = int((one >= 0).all(dim=1).sum())
            if rows:
                picture.paste(self.decode_codes(one[:rows]), (0, 0))
            pictures.append(picture)
        return pictures

    def _generate_codes(
        self, drawings: Sequence[Drawing], on_token: OnToken | None, canvas: Canvas | None = None
    ) -> Tensor:
        """Codes [n, h, w] of drawings that share their options. Raises `ValueError` for too little memory."""
        assert len({one.options for one in drawings}) == 1, "drawings that share a batch share their options"
        check_memory(self.memory.working, self.device, self.generator.embed.weight.dtype)
        given = None
        if canvas is not None:
            given = tasks.encode_pictures(self, [canvas.picture])[0].masked_fill(~canvas.kept.to(self.device), -1)
        return generate_codes(
            self.generator,
            [self.encode_prompt(one.text, planning.like_vector(one.like) if one.like else None) for one in drawings],
            [one.seed for one in drawings],
            drawings[0].options,
            grid=self.grid,
            given_codes=None if given is None else given.expand(len(drawings), -1, -1),
            on_token=on_token,
            engine=self.engine,
        )

    def _draw_codes(
        self, drawings: Sequence[Drawing], on_progress: OnProgress | None, canvas: Canvas | None = None
    ) -> Tensor:
        """Codes [n, h, w], with `on_progress` after every step."""
        if on_progress is None:
            return self._generate_codes(drawings, None, canvas)
        known = 0 if canvas is None else canvas.known
        total = count_steps(len(drawings), drawings[0].options, self.grid, known, self.memory.rows)

        def report(step: int, codes: Tensor) -> None:
            rows = (known + step) // self.grid[1]
            on_progress(DrawingProgress(step, total, rows, lambda: self.decode_partial(codes, canvas)))

        return self._generate_codes(drawings, report, canvas)

    def _finish(self, drawings: Sequence[Drawing], codes: Tensor, canvas: Canvas | None = None) -> list[Image.Image]:
        """The pictures of codes [n, h, w], with their recipes; completed ones say what was kept, and are none."""
        images = [self.decode_codes(one) for one in codes]
        if canvas is not None:
            images = [canvas.finish(image) for image in images]
        for image, one in zip(images, drawings, strict=True):
            image.info.update(self._recipe(one))
            if canvas is not None:
                image.info["kept"] = canvas.told
        return images

    def _recipe(self, drawing: Drawing) -> dict[str, Any]:
        """Everything that the picture depends on."""
        recipe: dict[str, Any] = {
            "prompt": drawing.prompt,
            "style": drawing.style,
            "text": drawing.text,
            "seed": drawing.seed,
            **asdict(drawing.options),
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
        if self.generator.config.prompt_features.used:
            recipe["towers_hash"] = self.config.parts["towers"].hash
        if drawing.like:
            recipe["like"] = drawing.like
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
