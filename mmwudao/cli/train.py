"""`train ...`, `assemble`, `tokenize`. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import typer

from data.options import SIDE
from data.settings import TokenizeSettings
from generation.drawing.sampling import SamplingOptions
from mmwudao.cli.options import Device, field_option, option_groups
from mmwudao.loading.options import Selection

app = typer.Typer(help="Train the parts of a model.", no_args_is_help=True)

# of each command the module with its `train` function, and the dataclass of its settings there
TRAININGS = {
    "tokenizer": ("vqvae.train_tokenizer", "TokenizerTrainConfig"),
    "generator": ("generation.training.train_generator", "GeneratorTrainConfig"),
    "style": ("generation.training.train_style", "StyleTrainConfig"),
    "upscaler": ("vqvae.train_upscaler", "UpscalerTrainConfig"),
    "retrieval": ("retrieval.training.train_towers", "RetrievalTrainConfig"),
    "text-encoder": ("retrieval.training.train_text_encoder", "TextEncoderTrainConfig"),
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
    from data.config import load_config
    from generation.training.config import GeneratorTrainConfig
    from generation.training.train_generator import train
    from mmwudao.loading.towers import FrozenTowers

    settings = load_config(GeneratorTrainConfig, config, overrides or [])
    named = settings.data.towers if settings.model.prompt_features.used else ""
    objective = None
    if settings.model.match.used:
        from mmwudao.matching import ContrastiveMatch  # this imports open_clip

        objective = ContrastiveMatch()
    train(settings, resume, FrozenTowers(named) if named else None, objective)


@app.command("style")
def train_style(config: Config, overrides: Overrides = None, resume: Resume = False, _: Fields = False) -> None:
    """Train a style for a frozen model on one family of pictures: prompt vectors, LoRA, or both."""
    from data.config import load_config
    from generation.training.train_style import StyleBase, StyleTrainConfig, train
    from mmwudao.pipeline import load

    settings = load_config(StyleTrainConfig, config, overrides or [])
    base = load(settings.base, device="cpu", dtype="float32")
    start = StyleBase(base.generator, base.text, base.config.parts["generator"].hash, base.features)
    train(settings, start, resume)


@app.command("upscaler")
def train_upscaler(config: Config, overrides: Overrides = None, resume: Resume = False, _: Fields = False) -> None:
    """Train the super-resolution model that `upscale` uses."""
    _train("upscaler", config, overrides, resume)


@app.command("retrieval")
def train_retrieval(config: Config, overrides: Overrides = None, resume: Resume = False, _: Fields = False) -> None:
    """Train the two towers that compare pictures with texts. Runs under torchrun too."""
    _train("retrieval", config, overrides, resume)


@app.command("text-encoder")
def train_text_encoder(config: Config, overrides: Overrides = None, resume: Resume = False, _: Fields = False) -> None:
    """Distil a small text encoder from a large one. Runs under torchrun too."""
    _train("text-encoder", config, overrides, resume)


@option_groups
def assemble(
    *,
    tokenizer: Annotated[Path, typer.Option(help="Take the trained image tokenizer in this folder.")],
    generator: Annotated[Path, typer.Option(help="Take the trained transformer in this folder.")],
    text: Annotated[Path, typer.Option(help="Take this SentencePiece model, which the transformer was trained with.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Make this new model directory.")],
    name: Annotated[str, typer.Option(help="The model has this name.")],
    image_size: Annotated[
        int, typer.Option(min=8, max=SIDE, help="The model draws pictures of this many pixels a side.")
    ],
    styles: Annotated[str, typer.Option(help="The model knows these picture families, as in noto,twemoji.")] = "",
    languages: Annotated[str, typer.Option(help="The model was trained with captions in these languages.")] = (
        "zh,en,fr,de,cs,ja,ko"
    ),
    default_sampling: SamplingOptions,
    card: Annotated[Path | None, typer.Option(help="Take this Markdown file as the model card.")] = None,
    describes: Annotated[
        Literal["no", "tagged", "untagged"],
        typer.Option(help="The transformer learned to describe pictures too: after a language's tag, or without one."),
    ] = "no",
    answers: Annotated[
        bool, typer.Option("--answers", help="The transformer learned to answer questions about pictures too.")
    ] = False,
    selection: Selection,
    upscaler: Annotated[Path | None, typer.Option(help="Take the trained upscaler in this folder.")] = None,
    towers: Annotated[Path | None, typer.Option(help="Take the trained retrieval towers in this folder.")] = None,
    encoder: Annotated[Path | None, typer.Option(help="Take an imported model's encoder of prompts.")] = None,
    eight_bits: Annotated[
        bool, typer.Option("--eight-bits", help="Store the transformer in 8 bits a number: half of the file.")
    ] = False,
) -> None:
    """Put trained parts together as a model directory, which `generate --model` reads.

    The options of sampling, --candidates and --judge are what the model draws with when `generate` is given none.
    """
    from mmwudao.loading.model_dir import assemble_model

    optional = {"upscaler": upscaler, "towers": towers, "encoder": encoder}
    made = assemble_model(
        tokenizer,
        generator,
        text,
        out,
        name=name,
        image_size=image_size,
        styles=_words(styles),
        languages=_words(languages),
        default_sampling=default_sampling,
        card=card.read_text(encoding="utf-8") if card else None,
        optional={part: path for part, path in optional.items() if path},
        describes=describes,
        answers=answers,
        selection=selection,
        eight_bits=eight_bits,
    )
    print(made)


def tokenize(
    sources: Annotated[
        list[Path], typer.Argument(help="Pictures to encode and decode, .npy codes to decode, or a folder of shards.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Write into this folder.")],
    model: Annotated[
        str,
        typer.Option(help="The model is a shipped name, a model directory, a hub id, or a trained tokenizer's folder."),
    ] = "emoji",
    size: Annotated[
        int | None, field_option(TokenizeSettings, "image_size")
    ] = None,
    device: Device = "auto",
    workers: Annotated[
        int | None, field_option(TokenizeSettings, "workers")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad picture in shards.")] = False,
    draft: Annotated[
        bool, typer.Option("--draft", help="Decode large JPEGs in shards faster, a few grey levels off.")
    ] = False,
    augment: Annotated[
        int,
        typer.Option(
            min=0,
            help="In shards, also encode this many shifted, scaled and, where direction means nothing, mirrored views "
            "of each picture of the split train.",
        ),
    ] = 0,
) -> None:
    """Encode pictures as codes (.npy) and decode codes (.png), or turn a folder of shards into shards of codes."""
    from mmwudao import tokenizing
    from mmwudao.cli.output import check_folder_name
    from mmwudao.loading.devices import choose_device
    from mmwudao.loading.model_dir import load_tokenizer

    check_folder_name(out)
    where = choose_device(device)
    tokenizer = load_tokenizer(model)
    if not any(source.is_dir() for source in sources):
        print("\n".join(tokenizing.tokenize_files(tokenizer, sources, out, size)))
        return
    if len(sources) > 1:
        raise ValueError("tokenize one folder of shards at a time, and pictures apart from it")
    manifest = tokenizing.tokenize_folder(
        tokenizer,
        sources[0],
        out,
        size,
        workers=workers,
        device=where.type,
        progress=sys.stderr.isatty(),
        strict=strict,
        draft=draft,
        augment=augment,
    )
    for split in manifest.splits:
        print(f"{split}: {manifest.samples(split)} samples")
    print(f"skipped: {sum(manifest.skipped.values())}")
    print(out)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
