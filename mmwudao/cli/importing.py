"""`import`: published weights of other projects to models and towers. Heavy imports happen inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Convert published weights of other projects.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Convert published weights of other projects."""  # without a callback, a single command would be the group


@app.command("cogview")
def import_cogview(
    tokenizer: Annotated[Path, typer.Option(help="The image tokenizer, vqvae_hard_biggerset_011.pt.")],
    generator: Annotated[Path, typer.Option(help="A checkpoint folder: cogview-base, cogview-caption, cogview-sr.")],
    text_model: Annotated[Path, typer.Option(help="The SentencePiece model, cog-pretrain.model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The new model directory.")],
    name: Annotated[str | None, typer.Option(help="The model's name; default: that of the checkpoint folder.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads; default: width / 64, as published.")] = None,
    image_size: Annotated[int, typer.Option(help="Pixels a side.")] = 256,
) -> None:
    """Convert CogView's files. They are read without running anything in them, and mapped instead of loaded."""
    from mmwudao.loading.importing import import_cogview as convert

    print(convert(tokenizer, generator, text_model, out, name=name, heads=heads, image_size=image_size))


Out = Annotated[Path, typer.Option("-o", "--out", help="The new folder of towers.")]


@app.command("brivl")
def import_brivl(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint, BriVL-1.0-5500w.pth.")],
    out: Out,
    text_model: Annotated[Path, typer.Option(help="A folder with vocab.txt of hfl/chinese-roberta-wwm-ext.")],
    config: Annotated[Path | None, typer.Option(help="Sizes as in cfg/test_xyb.yml, which is the default.")] = None,
) -> None:
    """Convert BriVL 1.0's checkpoint."""
    from retrieval.towers.importing import import_brivl as convert

    print(convert(source, out, text_model=text_model, config=config))


@app.command("chinese-clip")
def import_chinese_clip(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint, for example clip_cn_vit-b-16.pt.")],
    out: Out,
    model: Annotated[str, typer.Option(help="ViT-B-16, ViT-L-14, ViT-L-14-336, ViT-H-14 or RN50.")] = "ViT-B-16",
    vision_config: Annotated[Path | None, typer.Option(help="Other sizes: the original's JSON of the images.")] = None,
    text_config: Annotated[Path | None, typer.Option(help="Other sizes: the original's JSON of the texts.")] = None,
    vocab: Annotated[Path | None, typer.Option(help="vocab.txt; default: the one beside SRC.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels a side, to resize a ViT's positions for.")] = None,
    rounded: Annotated[bool, typer.Option(help="Round to half precision as the original's load_from_name.")] = False,
) -> None:
    """Convert a Chinese-CLIP checkpoint."""
    from retrieval.towers.importing import import_chinese_clip as convert

    if (vision_config is None) != (text_config is None):
        raise ValueError("--vision-config and --text-config go together")
    configs = (vision_config, text_config) if vision_config and text_config else None
    print(convert(source, out, model=model, configs=configs, vocab=vocab, image_size=image_size, rounded=rounded))


@app.command("open-clip")
def import_open_clip(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A folder with open_clip_config.json, or weights.")],
    out: Out,
    model: Annotated[str | None, typer.Option(help="The name in open_clip, if SRC is a file of weights.")] = None,
    tag: Annotated[str | None, typer.Option(help="Prepare pictures as for these published weights.")] = None,
    text_model: Annotated[Path | None, typer.Option(help="A folder with a Hugging Face text tower's files.")] = None,
) -> None:
    """Convert weights of open_clip."""
    from retrieval.towers.importing import import_open_clip as convert

    print(convert(source, out, model=model, tag=tag, text_model=text_model))
