"""`train ...`, `assemble`, `tokenize`. Heavy imports happen inside the commands."""

from __future__ import annotations

import io
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from vqvae.model import VQVAE

app = typer.Typer(help="Train the parts of a model.", no_args_is_help=True)

# of each command the module with its `train` function, and the dataclass of its settings there
TRAININGS = {
    "tokenizer": ("vqvae.train_tokenizer", "TokenizerTrainConfig"),
    "generator": ("generation.training.train_generator", "GeneratorTrainConfig"),
    "style": ("generation.training.train_style", "StyleTrainConfig"),
    "upscaler": ("vqvae.train_upscaler", "UpscalerTrainConfig"),
    "retrieval": ("retrieval.training.train_towers", "RetrievalTrainConfig"),
}


def training(command: str) -> tuple[ModuleType, type[Any]]:
    """The module of a training, and the dataclass of its settings."""
    name, settings = TRAININGS[command]
    module = import_module(name)
    return module, getattr(module, settings)


def _print_fields(context: typer.Context, wanted: bool) -> None:
    if wanted:
        from data.config_fields import describe_config

        print(describe_config(training(context.info_name or "")[1]))
        raise typer.Exit


Config = Annotated[Path, typer.Argument(help="The YAML file with the settings; --fields lists what it may hold.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Settings that replace those of the file, as in loop.steps=100."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")]
Fields = Annotated[
    bool,
    typer.Option(
        "--fields",
        callback=_print_fields,
        is_eager=True,
        help="Print every setting with its type, its default and its meaning, and leave.",
    ),
]


def _train(command: str, config: Path, overrides: list[str] | None, resume: bool) -> None:
    from data.config import load_config

    module, settings = training(command)
    module.train(load_config(settings, config, overrides or []), resume)


@app.command("tokenizer")
def train_tokenizer(config: Config, overrides: Overrides = None, resume: Resume = False, _: Fields = False) -> None:
    """Train the image tokenizer (VQ-VAE), and print the folder it is saved in."""
    _train("tokenizer", config, overrides, resume)


@app.command("generator")
def train_generator(config: Config, overrides: Overrides = None, resume: Resume = False, _: Fields = False) -> None:
    """Train the transformer. Runs under torchrun too: `torchrun --nproc-per-node 2 -m mmwudao train generator ...`."""
    _train("generator", config, overrides, resume)


@app.command("style")
def train_style(config: Config, overrides: Overrides = None, resume: Resume = False, _: Fields = False) -> None:
    """Train a style for a frozen model on one family of pictures: prompt vectors, LoRA, or both."""
    from data.config import load_config
    from generation.training.train_style import StyleBase, StyleTrainConfig, train
    from mmwudao.pipeline import load

    settings = load_config(StyleTrainConfig, config, overrides or [])
    base = load(settings.base, device="cpu", dtype="float32")
    train(settings, StyleBase(base.generator, base.text, base.config.parts["generator"].hash), resume)


@app.command("upscaler")
def train_upscaler(config: Config, overrides: Overrides = None, resume: Resume = False, _: Fields = False) -> None:
    """Train the super-resolution model that `upscale` uses."""
    _train("upscaler", config, overrides, resume)


@app.command("retrieval")
def train_retrieval(config: Config, overrides: Overrides = None, resume: Resume = False, _: Fields = False) -> None:
    """Train the two towers that compare pictures with texts. Runs under torchrun too."""
    _train("retrieval", config, overrides, resume)


def assemble(
    tokenizer: Annotated[Path, typer.Option(help="The folder of the trained image tokenizer.")],
    generator: Annotated[Path, typer.Option(help="The folder of the trained transformer.")],
    text: Annotated[Path, typer.Option(help="The SentencePiece model it was trained with.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The new model directory.")],
    name: Annotated[str, typer.Option(help="The model's name.")],
    image_size: Annotated[int, typer.Option(help="Pixels a side.")],
    styles: Annotated[str, typer.Option(help="The picture families it knows, as in noto,twemoji.")] = "",
    languages: Annotated[str, typer.Option(help="The languages of its captions.")] = "zh,en,fr,de,cs,ja,ko",
    temperature: Annotated[float, typer.Option(help="The sampling defaults ...")] = 1.0,
    top_k: Annotated[int, typer.Option(help="... that suit the model: 0 switches top-k off,")] = 0,
    top_p: Annotated[float, typer.Option(help="0 switches top-p off,")] = 0.0,
    guidance: Annotated[float, typer.Option(help="1 switches guidance off.")] = 1.0,
    window: Annotated[int, typer.Option(help="Codes tried in one pass; 1 draws one after the other.")] = 1,
    card: Annotated[Path | None, typer.Option(help="The model card, a Markdown file.")] = None,
    describes: Annotated[
        Literal["no", "tagged", "untagged"], typer.Option(help="Whether it learned to describe pictures too.")
    ] = "no",
    upscaler: Annotated[Path | None, typer.Option(help="The folder of a trained upscaler.")] = None,
    towers: Annotated[Path | None, typer.Option(help="The folder of trained retrieval towers.")] = None,
) -> None:
    """Put trained parts together as a model directory, which `generate --model` reads."""
    from generation.drawing.sampling import SamplingOptions
    from mmwudao.loading.model_dir import assemble as assemble_model

    made = assemble_model(
        tokenizer,
        generator,
        text,
        out,
        name=name,
        image_size=image_size,
        styles=_words(styles),
        languages=_words(languages),
        default_sampling=SamplingOptions(temperature, top_k, top_p, guidance, window),
        card=card.read_text(encoding="utf-8") if card else None,
        optional={part: path for part, path in (("upscaler", upscaler), ("towers", towers)) if path},
        describes=describes,
    )
    print(made)


def tokenize(
    sources: Annotated[
        list[Path], typer.Argument(help="Pictures to encode and decode, .npy codes to decode, or a folder of shards.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder for what is made.")],
    model: Annotated[
        str, typer.Option(help="A shipped name, a model directory, a hub id, or a trained tokenizer's folder.")
    ] = "emoji",
    size: Annotated[
        int | None, typer.Option(help="Crop to a square of that many pixels; default: pictures as they are.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    workers: Annotated[int | None, typer.Option(help="Batches in work at a time; default: one a core.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad picture in shards.")] = False,
    draft: Annotated[
        bool, typer.Option("--draft", help="Decode large JPEGs in shards faster, a few grey levels off.")
    ] = False,
) -> None:
    """Pictures to codes (.npy) and back (.png), or a folder of shards to shards of codes."""
    import torch

    from data.shards import MANIFEST_NAME, read_manifest
    from mmwudao.loading.devices import choose_device
    from mmwudao.loading.model_dir import load_tokenizer
    from vqvae.tokenize import tokenize_shards

    where = choose_device(device)
    tokenizer = load_tokenizer(model)
    folders = [source for source in sources if source.is_dir()]
    if not folders:
        # codes are looked up in float32, on the CPU, whatever the weights are stored in
        _tokenize_files(tokenizer.to(torch.float32), sources, out, size)
        return
    if len(sources) > 1:
        raise ValueError("tokenize one folder of shards at a time, and pictures apart from it")
    if not (folders[0] / MANIFEST_NAME).is_file():
        raise ValueError(f"{folders[0]} is no folder of shards (no {MANIFEST_NAME}): make one with `mmwudao data pack`")
    image_size = size or read_manifest(folders[0]).image_size
    if image_size is None:
        raise ValueError("these shards hold pictures of many sizes: say which with --size")
    manifest = tokenize_shards(
        tokenizer,
        folders[0],
        out,
        image_size=image_size,
        workers=workers,
        device=where.type,
        progress=sys.stderr.isatty(),
        strict=strict,
        draft=draft,
    )
    for split in manifest.splits:
        print(f"{split}: {manifest.samples(split)} samples")
    print(f"skipped: {sum(manifest.skipped.values())}")
    print(out)


def _tokenize_files(tokenizer: VQVAE, sources: list[Path], out: Path, size: int | None) -> None:
    """Write codes and decoded pictures of single files, all of them or none; print one line a file."""
    import numpy
    import torch

    from data.atomic import write_files
    from mmwudao.pictures import encode_png, unused_path
    from vqvae.tokenize import tensor_to_image, tokenize_image

    files: dict[Path, bytes] = {}
    lines = []
    for source in sources:
        if source.suffix == ".npy":
            try:
                codes = numpy.load(source, allow_pickle=False)
            except ValueError as error:
                raise ValueError(f"{source} is no array of codes: {error}") from error
            if codes.ndim != 2 or codes.dtype.kind not in "iu" or not codes.size:
                raise ValueError(f"{source} must hold whole numbers [h, w], not {codes.dtype} {list(codes.shape)}")
            image, figures = tensor_to_image(tokenizer.decode(torch.from_numpy(codes.astype("int64"))[None])[0]), ""
        else:
            try:
                tokenized = tokenize_image(tokenizer, source, size)
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error
            image, figures = tokenized.restored, f"  PSNR {tokenized.psnr:.2f} dB"
            buffer = io.BytesIO()
            numpy.save(buffer, tokenized.codes.to(torch.int32).numpy(), allow_pickle=False)
            path = unused_path(out, source.stem, ".npy", taken=frozenset(files))
            files[path] = buffer.getvalue()
            lines.append(f"{path}  {list(tokenized.codes.shape)} codes")
        path = unused_path(out, f"{source.stem}-decoded", taken=frozenset(files))
        files[path] = encode_png(image)
        lines.append(f"{path}{figures}")
    out.mkdir(parents=True, exist_ok=True)
    write_files(files)
    print("\n".join(lines))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
