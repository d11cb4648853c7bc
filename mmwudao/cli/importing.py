"""`import`: convert published weights of other projects. Heavy imports happen inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Convert published weights of other projects.", no_args_is_help=True)


@app.command("cogview")
def cogview(
    tokenizer: Annotated[Path, typer.Option(help="Read the tokenizer, vqvae_hard_biggerset_011.pt.")],
    generator: Annotated[Path, typer.Option(help="Read this folder: cogview-base, cogview-caption or cogview-sr.")],
    text_model: Annotated[Path, typer.Option(help="Read the SentencePiece model, cog-pretrain.model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Write this new model directory.")],
    name: Annotated[str | None, typer.Option(help="Name the model; by default like its folder.")] = None,
    heads: Annotated[int | None, typer.Option(help="Use this many heads; by default width / 64.")] = None,
    image_size: Annotated[int, typer.Option(help="Draw pictures of this many pixels a side.")] = 256,
) -> None:
    """Convert CogView's files. Nothing in them is executed, and they are mapped instead of loaded."""
    from mmwudao.loading.importing import import_cogview

    print(import_cogview(tokenizer, generator, text_model, out, name=name, heads=heads, image_size=image_size))


Out = Annotated[Path, typer.Option("-o", "--out", help="Write this new folder of towers.")]


@app.command("brivl")
def brivl(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint, BriVL-1.0-5500w.pth.")],
    out: Out,
    text_model: Annotated[Path, typer.Option(help="Read vocab.txt of hfl/chinese-roberta-wwm-ext from this folder.")],
    config: Annotated[Path | None, typer.Option(help="Read sizes from a file like cfg/test_xyb.yml.")] = None,
) -> None:
    """Convert BriVL 1.0's checkpoint."""
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
    image_size: Annotated[int | None, typer.Option(help="Resize a ViT's positions for pictures of this side.")] = None,
    rounded: Annotated[bool, typer.Option(help="Round weights to half precision as load_from_name does.")] = False,
) -> None:
    """Convert a Chinese-CLIP checkpoint."""
    from retrieval.towers.importing import ChineseClipImport, import_chinese_clip

    if (vision_config is None) != (text_config is None):
        raise ValueError("--vision-config and --text-config go together")
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
    from retrieval.towers.importing import import_open_clip

    print(import_open_clip(source, out, model=model, tag=tag, text_model=text_model))
