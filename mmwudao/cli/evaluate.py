"""`eval retrieval` and `eval generator`: measure a model. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmwudao.cli.options import Device, Json, field_option
from mmwudao.cli.output import output_folder
from mmwudao.cli.vectors import By, TowersDtype
from mmwudao.evaluation_settings import GeneratorEvalConfig
from retrieval.evaluation.settings import RetrievalEvalConfig

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(help="Measure a model.", no_args_is_help=True)

Shards = Annotated[Path, typer.Argument(help="A folder of shards.")]
WIDTH = 120  # columns of a table that is printed to a file or a pipe


@app.command("retrieval")
def eval_retrieval(
    model: Annotated[str, typer.Argument(help="A shipped name, a model directory, or a folder of towers.")],
    shards: Shards,
    out: Annotated[Path, typer.Option("-o", "--out", help="Write retrieval.json and .png to this folder.")] = Path(
        "mmwudao-out/eval-retrieval"
    ),
    split: Annotated[str | None, typer.Option(help="Measure these splits (a,b); by default all but train.")] = None,
    limit: Annotated[int | None, field_option(RetrievalEvalConfig, "limit")] = None,
    by: By = "towers",
    device: Device = "auto",
    dtype: TowersDtype = "float32",
    as_json: Json = False,
) -> None:
    """Measure recall in both directions, median rank and zero-shot accuracy for each language and split."""
    from mmwudao.loading.vectors import load_vector_maker
    from retrieval.evaluation.evaluate import evaluate, format_retrieval_table, held_out_splits, plot_recall

    config = RetrievalEvalConfig(tuple(split.split(",") if split else held_out_splits(shards)), limit)
    with output_folder(out):
        towers = load_vector_maker(by, model, device, dtype)
        record = {"model": model, "shards": str(shards)} | evaluate(
            towers, shards, config, progress=sys.stderr.isatty()
        )
        plot_recall(record, out / "retrieval.png")
        _print(record, format_retrieval_table(record), out / "retrieval.json", as_json)


@app.command("generator")
def eval_generator(
    model: Annotated[str, typer.Argument(help="A shipped name, a model directory, or a hub id.")],
    shards: Shards,
    out: Annotated[Path, typer.Option("-o", "--out", help="Write generator.json and nearest.png here.")] = Path(
        "mmwudao-out/eval-generator"
    ),
    towers: Annotated[str | None, typer.Option(help="Judge by these towers; by default the model's own.")] = None,
    split: Annotated[str, typer.Option(help="Take the prompts from this split.")] = "test-family",
    prompts: Annotated[int, field_option(GeneratorEvalConfig, "prompts")] = GeneratorEvalConfig.prompts,
    candidates: Annotated[int, field_option(GeneratorEvalConfig, "candidates")] = GeneratorEvalConfig.candidates,
    neighbours: Annotated[int, field_option(GeneratorEvalConfig, "neighbours")] = GeneratorEvalConfig.neighbours,
    train_limit: Annotated[int | None, field_option(GeneratorEvalConfig, "train_limit")] = None,
    seed: Annotated[int, field_option(GeneratorEvalConfig, "seed")] = GeneratorEvalConfig.seed,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure the R-precision of drawn, real and random pictures, and find the nearest training pictures."""
    from data.atomic import write_files
    from mmwudao.evaluation import evaluate_generator, format_generator_table
    from mmwudao.loading.towers import load_model_towers
    from mmwudao.pictures import encode_png
    from mmwudao.pipeline import load

    judge = load_model_towers(towers or model, device)
    config = GeneratorEvalConfig(split, prompts, candidates, neighbours, train_limit, seed)
    pipe = load(model, device)
    with output_folder(out):
        measured, sheet = evaluate_generator(pipe, judge, shards, config, progress=sys.stderr.isatty())
        write_files({out / "nearest.png": encode_png(sheet)})
        record = {"model": model, "towers": towers or model, "shards": str(shards)} | measured
        _print(record, format_generator_table(record), out / "generator.json", as_json)


def _print(record: dict[str, Any], table: Table, path: Path, as_json: bool) -> None:
    from rich.console import Console

    text = json.dumps(record, ensure_ascii=False, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
        return
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)
    print(path)
