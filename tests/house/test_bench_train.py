import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from bench.speed import train_pictures_speed, train_speed
from data.text import TextTokenizer
from generation.rows.row import collate
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer

SHARDS = Path(__file__).parents[2] / "data/samples/emoji"


def run(monkeypatch, capsys, *options: str) -> dict:
    monkeypatch.setattr("sys.argv", ["train_speed.py", "--shape", "tiny", "--minutes", "0.001", *options])
    train_speed.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_ours_beside_the_peer(monkeypatch, capsys):
    variants = ["plain", "packed", "packed+checkpointed+unfused", "muon", "peer", "peer+checkpointed"]
    record = run(monkeypatch, capsys, "--variants", *variants)
    assert [row["variant"] for row in record["runs"]] == variants
    for row in record["runs"]:
        assert row["steps"] >= 2
        assert 0 < row["mfu"] < 1
        assert 0 < row["real_tokens_per_s"] <= row["tokens_per_s"]
        assert (row["real_tokens_per_s"] == row["tokens_per_s"]) == row["variant"].startswith("packed")
    assert set(record["ratio"]) == set(variants) - {"peer"}
    assert 0 < record["padding"] < 0.5


def test_ratios_are_between_the_best_of_the_rounds():
    speeds = [("plain", 2.0), ("peer", 4.0), ("plain", 3.0), ("peer", 1.0)]
    assert train_speed.ratios([{"variant": v, "real_tokens_per_s": speed} for v, speed in speeds]) == {"plain": 0.75}


def test_rows_that_describe(monkeypatch, capsys):
    monkeypatch.setattr(train_speed, "peak_flops", lambda device, dtype: (1e12, "given"))
    record = run(monkeypatch, capsys, "--describe", "--variants", "plain", "packed", "--precision", "bfloat16")
    assert [row["variant"] for row in record["runs"]] == ["plain", "packed"]
    assert record["ratio"] == {}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--variants", "packed+fast"], "unknown variant 'packed"),
        (["--variants", "peer+packed"], "unknown variant 'peer"),
        (["--describe"], "leave it out"),
    ],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, options, problem):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, *options)
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["modern", "cogview"])
def test_the_peer_has_our_shape(preset):
    sizes = {"num_image_codes": 64, "num_text_pieces": 100, "width": 32, "depth": 3, "heads": 2, "grid": (4, 4)}
    config = getattr(TransformerConfig, preset)(**sizes)
    ours, peer = Transformer(config), train_speed.peer_model(config)
    # Llama has q, k, v and the gate apart
    weights = [sum(p.numel() for p in model.parameters() if p.ndim == 2) for model in (ours, peer)]
    assert weights[0] == weights[1]
    assert peer.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("shape", "millions"), [("emoji", 7), ("1b", 1123), ("4b", 3928)])
def test_shapes_have_the_size_of_their_name(shape, millions):
    text = TextTokenizer(SHARDS / "text.model")
    config = train_speed.shape_config(shape, 0, text)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.1)
    assert train_speed.shape_config(shape, 2, text).depth == 2


def test_rows_are_of_real_captions():
    text = TextTokenizer(SHARDS / "text.model")
    config = train_speed.shape_config("emoji", 0, text)
    rows = list(islice(train_speed.draw_rows(config, text, SHARDS, False, 16), 64))
    lengths = [len(row.tokens) for row in rows]
    assert min(lengths) >= 259
    assert max(lengths) <= 256 + 32 + 3
    assert len(set(lengths)) > 10
    describing = list(islice(train_speed.draw_rows(config, text, SHARDS, True, 16), 32))
    codes = [int((row.tokens < 1024).sum()) for row in describing]
    assert len(set(codes[:16])) == len(set(codes[16:])) == 1
    assert codes[0] != codes[16]
    assert collate(config.vocabulary, describing).segments is not None


def test_a_shape_too_large_is_cut_to_what_fits(monkeypatch):
    text = TextTokenizer(SHARDS / "text.model")
    large = train_speed.shape_config("4b", 0, text)
    layers = {}
    for gib in (1, 40, 79, 139):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gib=gib: (gib * 2**30, gib * 2**30))
        layers[gib] = train_speed.fitting_layers(large, 8, checkpointed=True)
    assert layers[1] == 1
    assert 15 < layers[40] < 25
    assert 40 < layers[79] < 48
    assert layers[139] == 48
    assert train_speed.fitting_layers(train_speed.shape_config("1b", 0, text), 12, checkpointed=False) == 20


def test_fewer_layers_when_memory_runs_out(monkeypatch, capsys):
    monkeypatch.setattr(train_speed, "peak_flops", lambda device, dtype: (1e12, "given"))
    measure, depths = train_speed.measure, []

    def full(config, *rest):
        depths.append(config.depth)
        if config.depth > 4:
            raise torch.OutOfMemoryError
        return measure(config, *rest)

    monkeypatch.setattr(train_speed, "measure", full)
    shape_config = train_speed.shape_config
    monkeypatch.setattr(train_speed, "shape_config", lambda shape, layers, text: shape_config(shape, layers or 8, text))
    assert run(monkeypatch, capsys, "--variants", "plain")["layers"] == 4
    assert depths == [8, 6, 4]
    with pytest.raises(torch.OutOfMemoryError):
        run(monkeypatch, capsys, "--variants", "plain", "--layers", "6")


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("tokenizer", ["model.channels=[4,8]", "data.image_size=32"]),
        ("towers", ["model.image_size=32", "model.head_width=32", "loop.warmup=1"]),
    ],
)
def test_pictures_a_second(monkeypatch, capsys, part, changes):
    options = ["--parts", part, "--minutes", "0.001", "--set", "loop.batch_size=4", *changes]
    monkeypatch.setattr("sys.argv", ["train_pictures_speed.py", *options])
    monkeypatch.setattr(train_pictures_speed, "peak_flops", lambda device, dtype: (1e12, "given"))
    train_pictures_speed.main()
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["parts"]
    assert row["part"] == part
    assert row["steps"] >= 2
    assert row["pictures_per_s"] > 0
    assert 0 < row["mfu"] < 1
