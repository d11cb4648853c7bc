import json

import pytest
import torch

from bench.speed import decode_speed, growth_speed
from generation.rows.draw import training_row
from tests.helpers.generators import PRESETS, make_model


@pytest.mark.parametrize("preset", PRESETS)
def test_the_originals_way_gives_our_hidden_states(preset):
    """A peer that computed something else would be no peer."""
    model = make_model(PRESETS[preset])
    config = model.config
    if config.norm == "max_scaled_layernorm" or config.pb_relax:
        pytest.skip("its steps depend on how the row is cut, or attention is not the same")
    row = training_row(config.vocabulary, [1, 2], torch.arange(16).view(4, 4), config.max_text, config.position_kind)
    with torch.inference_mode():
        whole = model(row.tokens[None], row.positions[None])
        memories = [torch.empty(1, 0, config.width)] * config.depth
        found = []
        for start, end in ((0, 5), *((k, k + 1) for k in range(5, len(row.tokens)))):
            tokens = row.tokens[None, start:end]
            hidden, memories = decode_speed.step_as_the_original(model, tokens, row.positions[:end], memories)
            found.append(hidden)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=2e-5, rtol=1e-5)


def test_decode_speed_runs_all_contenders(monkeypatch, capsys):
    contenders = ["auto", "modules", "int8", "llama", "llama-static", "gpt2", "original"]
    arguments = ["--shape", "1x64", "--codes", "4", "--runs", "1", "--batches", "2", "--original-steps", "3"]
    monkeypatch.setattr("sys.argv", ["decode_speed.py", *arguments, "--contenders", *contenders])
    decode_speed.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["contender"] for row in record["rows"]] == contenders
    assert all(row["s"] > 0 for row in record["rows"])
    assert record["codes"] == 16


def test_growth_speed_measures_a_point():
    row = growth_speed.draw(codes=16, pictures=2, layers=1, device="cpu")
    assert row["s"] > 0
    assert row["late_ms"] > 0
    assert row["peak_mb"] > row["planned_mb"] / 2
