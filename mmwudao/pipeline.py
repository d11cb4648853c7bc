"""Text to pictures: load a model directory, draw, and draw a remembered picture again."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.styles import with_style
from data.text import TextTokenizer
from generation.adapters import AdapterConfig, apply_adapter
from generation.decoding import SamplingOptions, count_steps, generate_codes
from generation.memory import DrawingMemory, check_memory, plan_drawing
from generation.model import Transformer
from mmwudao import __version__, tasks, upscaling
from mmwudao.model_dir import (
    ModelConfig,
    check_hash,
    check_pairing,
    copy_model,
    find_model,
    read_model_config,
)
from vqvae.hub import ModelError, content_hash, load_part
from vqvae.model import VQVAE

MAX_PROMPT = 1000  # characters; what exceeds the model's own text length is cut with a warning
MAX_PICTURES = 1000  # a call
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a call is: `done` of `total` steps, `rows` of codes, and a way to look at the pictures so far.

    A step draws one code in each picture of a block; blocks of pictures are drawn one after the other.
    """

    done: int
    total: int
    rows: int
    preview: Callable[[], list[Image.Image]]


def load(
    model: str | Path = "emoji", device: str = "auto", dtype: str = "auto", adapter: str | Path | None = None
) -> Pipeline:
    """Load a model by shipped name, folder, or hub id, with the style in the folder `adapter` if there is one.

    `device` is one of `DEVICES`; `dtype` is "auto" or a key of `DTYPES`: what the transformer computes in (the image
    tokenizer is small and stays in float32). Every part is checked against the hashes in `config.json`.

    Raises `ValueError` for an unknown or absent device or dtype and for a model that the device has no room for,
    `ModelError` (a `ValueError`) for a model that is missing, incomplete or not what its config.json says, and for an
    adapter that is damaged or another model's.
    """
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    folder, config, tokenizer, generator, text = load_parts(model)
    # the parts are still the mapped files, which take no memory that others need
    plan = plan_drawing(generator.config, tokenizer.config, chosen_dtype, chosen_device.type)
    check_memory(plan.total, chosen_device, chosen_dtype)
    tokenizer.to(device=chosen_device, dtype=torch.float32)
    generator.to(device=chosen_device, dtype=chosen_dtype)
    style = apply_adapter(generator, Path(adapter), config.parts["generator"].hash) if adapter else None
    return Pipeline(str(model), folder, config, tokenizer, generator, text, style)


def load_parts(model: str | Path) -> tuple[Path, ModelConfig, VQVAE, Transformer, TextTokenizer]:
    """The parts as they are stored, checked against config.json and against each other. Raises `ModelError`."""
    folder = find_model(model)
    config = read_model_config(folder)
    tokenizer = load_part(VQVAE, folder / config.parts["tokenizer"].path)
    generator = load_part(Transformer, folder / config.parts["generator"].path)
    # the hashes vouch for it; CogView's text model has no byte pieces
    text = TextTokenizer(folder / config.parts["text"].path, needs_bytes=False)
    hashes = {
        "tokenizer": content_hash(tokenizer),
        "generator": content_hash(generator),
        "text": text.content_hash,
    }
    for part, found in hashes.items():
        check_hash(folder, part, found, config.parts[part].hash)
    check_pairing(generator.config.tokenizer_hash, generator.config.text_hash, hashes)
    if config.image_size % tokenizer.config.stride:
        raise ModelError(f"{folder}: image_size must be a multiple of {tokenizer.config.stride}")
    return folder, config, tokenizer, generator, text


class Pipeline:
    """A loaded model. `source` is what `load` was asked for, `folder` where it was found.

    `adapter` describes the style that the generator has been given, if any.
    """

    def __init__(
        self,
        source: str,
        folder: Path,
        config: ModelConfig,
        tokenizer: VQVAE,
        generator: Transformer,
        text: TextTokenizer,
        adapter: AdapterConfig | None = None,
    ) -> None:
        self.adapter = adapter
        self.source, self.folder, self.config = source, folder, config
        self.tokenizer, self.generator, self.text = tokenizer, generator, text
        side = config.image_size // tokenizer.config.stride
        self.grid = (side, side)

    @property
    def device(self) -> torch.device:
        return next(self.generator.parameters()).device

    @cached_property
    def memory(self) -> DrawingMemory:
        """What drawing takes."""
        dtype = next(self.generator.parameters()).dtype
        return plan_drawing(self.generator.config, self.tokenizer.config, dtype, self.device.type, self.grid)

    @property
    def dtype(self) -> str:
        """The name of the transformer's number format, as `load` takes it."""
        return str(next(self.generator.parameters()).dtype).removeprefix("torch.")

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
        candidates: int | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[Image.Image]:
        """Draw `n` pictures of each prompt, prompt by prompt; `.info` of each is the recipe to draw it again.

        Picture k of the call is drawn with `seed + k`; without `seed`, one is drawn and recorded. What is None is
        taken from the model's defaults. With `candidates`, so many are drawn of each prompt, and the n that describe
        it best are returned, best first (see `rerank`; `.info["score"]`). `on_progress` is called after every step.

        Raises `ValueError` for an empty or overlong prompt, `n` below 1 or beyond `candidates`, an unknown style, bad
        sampling options, or when the device has too little memory left; `ModelError` for candidates of a model that
        cannot describe.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("no prompt: say what to draw")
        drawn = n if candidates is None else candidates
        if not 1 <= n <= drawn or drawn * len(prompts) > MAX_PICTURES:
            raise ValueError(
                f"n must be at least 1, at most the candidates, and one call draws at most {MAX_PICTURES} pictures: "
                f"n is {n}" + ("" if candidates is None else f", candidates {candidates}")
            )
        if candidates is not None and self.config.describes == "no":
            raise ModelError(f"{self.source} cannot choose among candidates: it was not trained to describe pictures")
        texts = [self._text(one, style) for one in prompts]
        seeds = self._seeds(seed, drawn * len(prompts))
        options = self._options(temperature, top_k, top_p, guidance)
        codes = self._draw([text for text in texts for _ in range(drawn)], seeds, options, on_progress)
        images = []
        for i, one in enumerate(prompts):
            pictures = range(i * drawn, (i + 1) * drawn)
            scores: dict[int, float] = {}
            if candidates is not None:
                scored = tasks.score_codes(self, one, codes[pictures.start : pictures.stop], guess_language(one))
                scores = dict(zip(pictures, scored, strict=True))
            for k in sorted(pictures, key=lambda k: -scores.get(k, 0.0))[:n]:
                image = self._decode(codes[k])
                image.info.update(self._recipe(one, style, texts[i], seeds[k], options))
                if k in scores:
                    image.info["score"] = scores[k]
                images.append(image)
        return images

    def caption(self, images: Sequence[Image.Image], language: str | None = None) -> list[str]:
        """See `tasks.caption`."""
        return tasks.caption(self, images, language)

    def rerank(self, prompt: str, images: Sequence[Image.Image]) -> list[float]:
        """How well each picture says the prompt back: its log probability (nats) as a description of the picture.

        CogView's post-selection (section 3.3) by inverse prompting (Zou et al. 2021, arXiv:2103.10685). Scores compare
        pictures for one prompt, not prompts. Raises `ValueError` for no picture or a bad prompt, `ModelError` for a
        model that cannot describe.
        """
        check_prompt(prompt)
        return tasks.score_codes(self, prompt, tasks.encode_pictures(self, images), guess_language(prompt))

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
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[Image.Image]:
        """Keep part of a picture (its centre square; see `tasks.kept_cells`) and draw the rest `n` times.

        What is kept has gone through the image tokenizer. `.info` tells how each was drawn, without being a recipe.
        Raises `ValueError` as `generate` does, and for a `keep` that cannot be completed.
        """
        if not 1 <= n <= MAX_PICTURES:
            raise ValueError(f"n must lie in 1..{MAX_PICTURES}, not {n}")
        text, seeds = self._text(prompt, style), self._seeds(seed, n)
        options = self._options(temperature, top_k, top_p, guidance)
        kept = tasks.kept_cells(keep, self.grid).to(self.device)
        given = tasks.encode_pictures(self, [image])[0].masked_fill(~kept, -1)
        codes = self._draw([text] * n, seeds, options, on_progress, given.expand(n, -1, -1))
        images = [self._decode(one) for one in codes]
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
        options = SamplingOptions(**{name: recipe[name] for name in asdict(self.config.default_sampling)})
        image = self._decode(self._draw([recipe["text"]], [recipe["seed"]], options, on_progress)[0])
        image.info.update(
            self._recipe(recipe["prompt"], recipe.get("style"), recipe["text"], recipe["seed"], options)
        )
        return image

    def save(self, folder: Path | str) -> Path:
        """Copy the model to the new directory `folder`. Raises `ModelError` when it is in use."""
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
        self, temperature: float | None, top_k: int | None, top_p: float | None, guidance: float | None
    ) -> SamplingOptions:
        given: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
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
        check_memory(self.memory.working, self.device, DTYPES[self.dtype])
        rows = [self._encode(text) for text in texts]
        prefix = 0
        if given_codes is not None:
            prefix = int((given_codes >= 0).flatten(1).all(dim=0).int().cumprod(dim=0).sum())
        total = count_steps(len(rows), options, self.grid, prefix, self.memory.rows)

        def report(step: int, codes: Tensor) -> None:
            if on_progress is not None:
                rows_done = (prefix + step) // self.grid[1]
                on_progress(Progress(step, total, rows_done, lambda: self._decode_partial(codes)))

        return generate_codes(
            self.generator, rows, seeds, options, grid=self.grid, given_codes=given_codes, on_token=report
        )

    def _encode(self, text: str) -> list[int]:
        pieces = self.text.encode(text)
        prompt = self.generator.config.vocabulary.prompt_pieces
        longest = self.generator.config.max_text - len(prompt)
        if len(pieces) > longest:
            read = self.text.decode(pieces[:longest])
            log.warning("the model reads %d pieces of text at most; it stops after %r", longest, read[-40:])
        return [*prompt, *pieces[:longest]]

    def _decode(self, codes: Tensor) -> Image.Image:
        """Codes [h, w] to a picture. One at a time: a batch's convolutions may round differently."""
        pixels = (self.tokenizer.decode(codes[None])[0] * 255).round().to("cpu", torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    def _decode_partial(self, codes: Tensor) -> list[Image.Image]:
        """Codes so far [n, h, w], -1 where none is drawn, to pictures that are white below the last whole row."""
        pictures = []
        for one in codes:
            picture = Image.new("RGB", (self.config.image_size,) * 2, "white")
            rows = int((one >= 0).all(dim=1).sum())
            if rows:
                picture.paste(self._decode(one[:rows]), (0, 0))
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


def choose_device(device: str) -> torch.device:
    """The torch device of a name in `DEVICES`. Raises `ValueError` for another name or one this machine lacks."""
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; choose from {', '.join(DEVICES)}")
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, here in present.items() if here)
    if not present[device]:
        raise ValueError(f"PyTorch finds no {device} device on this machine: use --device auto or cpu")
    return torch.device(device)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a name in `DTYPES`; "auto" is bfloat16 where the hardware multiplies it natively.

    Raises `ValueError` for another name.
    """
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise ValueError(f"unknown dtype {dtype!r}; choose from auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and cpu_multiplies_bfloat16()
    return torch.bfloat16 if native else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has AMX or AVX512-BF16; elsewhere PyTorch emulates bfloat16, which is slower than float32."""
    # torch.ops.mkldnn._is_mkldnn_bf16_supported() will not do: it is true for plain AVX512 too
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def guess_language(text: str) -> str:
    """The language whose phrase names a style in `text`: by script, then by letters and articles; else English."""
    for language, pattern in _LANGUAGE_SIGNS:
        if pattern.search(text):
            return language
    return "en"


_LANGUAGE_SIGNS = [
    (language, re.compile(pattern, re.IGNORECASE))
    for language, pattern in (
        ("ko", r"[\u1100-\u11ff\uac00-\ud7af]"),
        ("ja", r"[\u3040-\u30ff]"),  # kana; Chinese characters alone are read as Chinese
        ("zh", r"[\u3400-\u9fff]"),
        ("cs", r"[ěřůčďťňšž]"),
        ("de", r"[äöüß]|\b(?:ein|eine|der|die|das|mit|und)\b"),
        ("fr", r"[éèêëàâçîïôûùœ]|\b(?:un|une|le|la|les|du|des|avec|et)\b"),
    )
]
