import gc
import sys
import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from generation.drawing import fused_step
from generation.drawing.decoding import generate_codes
from generation.drawing.engines import Engine, Kind, StaticStep, make_cache, make_step
from generation.drawing.fused_step import can_fuse
from generation.drawing.products import make_product
from generation.drawing.prompts import pad_prompts, prefill
from generation.drawing.ragged_cache import RaggedCache
from generation.drawing.sampling import SamplingOptions
from generation.transformer.config import TransformerConfig
from generation.transformer.int8 import is_quantised, quantise
from generation.transformer.model import Transformer
from tests.helpers.generators import GRID, PRESETS, PROMPTS, SEEDS, make_model

SAMPLED = SamplingOptions(temperature=0.9, top_k=20, guidance=2.0)


@pytest.fixture(scope="module")
def modern() -> Transformer:
    return make_model(PRESETS["modern"])


@torch.inference_mode()
def run(model: Transformer, kind: Kind, prepare=None, stride=1000) -> torch.Tensor:
    """Logits [R, S, N] of all places of `GRID` after three prompts, by made-up codes."""
    prompts = pad_prompts(model.config, PROMPTS[:3], GRID)
    cache = make_cache(kind, model, prompts.hidden)
    results = [prefill(model, prompts, cache)]
    if prepare is None:
        step = make_step(kind, model, prompts.code_positions, cache)
    else:
        assert isinstance(cache, RaggedCache)
        cache.begin(prompts.hidden)
        step = StaticStep(model, prompts.code_positions, cache, prepare, stride)
    for place in range(GRID[0] * GRID[1] - 1):
        results.append(step((torch.arange(3) * 5 + place) % model.config.num_image_codes, place).clone())
    return torch.stack(results, dim=1)


def test_the_fused_step_gives_the_modules_logits(modern):
    assert Engine().resolved(modern) == "fused"
    torch.testing.assert_close(run(modern, "fused"), run(modern, "modules"), atol=2e-5, rtol=1e-5)


def test_only_what_it_knows_is_fused(modern):
    assert not can_fuse(make_model(PRESETS["cogview"]))
    with pytest.raises(ValueError, match="modern structure on a CPU"):
        Engine("fused").resolved(make_model(PRESETS["cogview"]))
    for change in ({"norm": "layernorm"}, {"mlp": "gelu"}, {"sandwich": True}, {"bias": True}):
        sizes = {"width": 32, "depth": 1, "heads": 2, "grid": GRID, "max_text": 4}
        config = TransformerConfig.modern(**sizes, **change)
        assert Engine().resolved(Transformer(config)) == "modules"


@pytest.mark.parametrize("changes", [{"heads": 6, "kv_heads": 3}, {"heads": 6, "kv_heads": 1, "qk_norm": False}])
@pytest.mark.parametrize("position", ["rotary_2d", "rotary_1d"])
def test_heads_that_share_keys_are_fused(changes, position):
    sizes = {"width": 96, "depth": 2, "num_image_codes": 32, "num_text_pieces": 50, "grid": GRID, "max_text": 6}
    model = make_model(TransformerConfig.modern(**sizes, **changes, position=position))
    assert Engine().resolved(model) == "fused"
    torch.testing.assert_close(run(model, "fused"), run(model, "modules"), atol=2e-5, rtol=1e-5)
    codes = [generate_codes(model, PROMPTS[:5], SEEDS[:5], SAMPLED, grid=GRID, engine=Engine(kind))
             for kind in ("fused", "modules")]  # fmt: skip
    assert torch.equal(*codes)
    assert torch.equal(generate_codes(model, PROMPTS[3:4], SEEDS[3:4], SAMPLED, grid=GRID)[0], codes[0][3])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_static_step_gives_the_modules_logits(preset):
    model = make_model(PRESETS[preset])
    prepared = []

    def prepare(step):
        prepared.append(step)
        return step

    found = run(model, "graph", prepare, stride=8)  # the reach grows on the way
    assert len(prepared) > 1
    torch.testing.assert_close(found, run(model, "modules"), atol=2e-5, rtol=1e-5)


def test_prompts_of_different_lengths_are_not_padded(modern):
    prompts = pad_prompts(modern.config, PROMPTS[:3], GRID)
    tokens, positions = prompts.tokens, prompts.positions
    cache = RaggedCache(modern.config, prompts.hidden, dtype=torch.float32, device="cpu")
    padding = cache.padding.tolist()
    assert padding == [modern.config.max_text - length for length in map(len, PROMPTS[:3])]
    aligned = cache.align(tokens)
    for row, left in enumerate(padding):
        length = tokens.shape[1] - left
        assert aligned[row, :length].tolist() == tokens[row, left:].tolist()
        assert cache.align(positions[:, : tokens.shape[1]])[row, :length].equal(positions[row, left : tokens.shape[1]])
    cache.move_to(tokens.shape[1] + 2)
    assert (cache.starts + cache.padding == tokens.shape[1] + 2).all()
    for stored in (cache.keys, cache.values):
        assert stored.transpose(2, 3).is_contiguous()
    # the longest row of these, not the longest that the model reads, says how far attention goes
    assert cache.least_padding == min(padding)


def test_a_static_step_is_one_graph_for_all_places(modern):
    """What torch.compile traces has no break and no guard on the place, or it would compile at every step."""
    torch._dynamo.reset()
    counter = CompileCounter()
    found = run(modern, "compile", prepare=lambda step: torch.compile(step, backend=counter, fullgraph=True))
    torch.testing.assert_close(found, run(modern, "modules"), atol=2e-5, rtol=1e-5)
    assert counter.frame_count == 1


def test_a_recorded_step_is_kept_for_the_next_pictures(monkeypatch):
    model = make_model(PRESETS["modern"])
    prepared = []

    def prepare(step):
        prepared.append(step)
        return step

    monkeypatch.setattr("generation.drawing.engines.compiled", prepare)
    for options, prompts in ((SamplingOptions(temperature=0), PROMPTS[:2]), (SAMPLED, PROMPTS[2:4]), (SAMPLED, [[]])):
        arguments: tuple[Any, ...] = (model, prompts, SEEDS[: len(prompts)], options)
        plain = generate_codes(*arguments, grid=GRID, engine=Engine("modules"))
        engine = Engine("compile", images=2 if options.guidance == 1 else 1)  # two rows
        assert torch.equal(generate_codes(*arguments, grid=GRID, engine=engine), plain)
    assert len(prepared) == 1
    assert deepcopy(model)._recorded is None
    alive = weakref.ref(model)
    del model, arguments, prepared[:]
    gc.collect()
    assert alive() is None


@pytest.mark.slow
def test_compiled_pictures_are_the_modules_pictures(modern):
    options = SamplingOptions(temperature=0)
    arguments = (modern, PROMPTS[:2], SEEDS[:2], options)
    plain = generate_codes(*arguments, grid=GRID, engine=Engine("modules"))
    assert torch.equal(generate_codes(*arguments, grid=GRID, engine=Engine("compile", images=2)), plain)


@pytest.mark.parametrize("kind", ["modules", "fused"])
@pytest.mark.parametrize("images", [0, 1, 4])
def test_pictures_of_all_engines_and_blocks_are_the_same_but_for_rounding(modern, kind, images):
    plain = generate_codes(modern, PROMPTS[:3], SEEDS[:3], SAMPLED, grid=GRID, engine=Engine("modules"))
    found = generate_codes(modern, PROMPTS[:3], SEEDS[:3], SAMPLED, grid=GRID, engine=Engine(kind, images))
    assert torch.equal(found, plain)


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 3), (2.0, 6)])
def test_an_engine_says_how_many_pictures_a_block_has(modern, guidance, rows):
    seen = []
    hook = modern.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    options = SamplingOptions(guidance=guidance)
    generate_codes(modern, PROMPTS[:5], SEEDS[:5], options, grid=GRID, engine=Engine("modules", images=3))
    hook.remove()
    assert set(seen) == {1, rows}, "a prompt is read by itself"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"kind": "fast"}, "unknown engine 'fast'"), ({"images": -1}, "images must be 0")],
)
def test_bad_engines(arguments, said):
    with pytest.raises(ValueError, match=said):
        Engine(**arguments)


def test_a_graph_needs_cuda(modern):
    with pytest.raises(ValueError, match="needs a CUDA device"):
        generate_codes(modern, [[1]], [0], grid=GRID, engine=Engine("graph"))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["graph", "compile"])
@pytest.mark.parametrize("preset", PRESETS)
def test_recorded_steps_draw_the_modules_pictures(preset, kind):
    model = make_model(PRESETS[preset]).cuda()
    options = SamplingOptions(temperature=0, guidance=2.0)
    plain = generate_codes(model, PROMPTS, SEEDS, options, grid=GRID, engine=Engine("modules"))
    assert torch.equal(generate_codes(model, PROMPTS, SEEDS, options, grid=GRID, engine=Engine(kind)), plain)


def test_weights_of_8_bits_draw_nearly_the_same(modern):
    quantised = quantise(deepcopy(modern))
    assert is_quantised(quantised)
    assert not is_quantised(modern)
    fused, modules, plain = run(quantised, "fused"), run(quantised, "modules"), run(modern, "modules")
    assert 0 < (modules - plain).abs().max() < 0.05 * plain.abs().max()
    assert 0 < (fused - modules).square().mean().sqrt() < 0.02 * modules.std(), "rows are rounded in another order"


def test_weights_of_8_bits_are_multiplied_as_they_are_stored(modern, monkeypatch):
    made = []

    def noted(matrix):
        made.append(matrix.shape)
        return make_product(matrix)

    monkeypatch.setattr(fused_step, "make_product", noted)
    run(quantise(deepcopy(modern)), "fused")
    assert made == [(modern.config.num_image_codes, modern.config.width)], "the head alone is not of 8 bits"


def test_large_models_are_fused_with_weights_of_8_bits(monkeypatch):
    """Their blocks are not copied; and one-dimensional positions, no qk-norm and a head with a layer are known."""
    sizes = {"width": 64, "depth": 2, "heads": 2, "num_image_codes": 32, "num_text_pieces": 50, "grid": GRID}
    config = TransformerConfig.modern(**sizes, max_text=6, qk_norm=False, position="rotary_1d", image_head="mlp")
    model = make_model(config)
    assert torch.allclose(run(model, "fused"), run(model, "modules"), atol=1e-4)
    monkeypatch.setattr(fused_step, "MOST_NUMBERS", fused_step.fused_numbers(config, eight_bits=True))
    assert not can_fuse(model)
    quantised = quantise(deepcopy(model))
    assert can_fuse(quantised)
    fused, modules = run(quantised, "fused"), run(quantised, "modules")
    assert 0 < (fused - modules).square().mean().sqrt() < 0.02 * modules.std()


def test_a_picture_by_weights_of_8_bits_is_the_same_in_any_company(modern):
    quantised = quantise(deepcopy(modern))
    together = generate_codes(quantised, PROMPTS[:8], SEEDS[:8], SAMPLED, grid=GRID)
    for k in (0, 3, 7):
        alone = generate_codes(quantised, [PROMPTS[k]], [SEEDS[k]], SAMPLED, grid=GRID)
        assert torch.equal(alone[0], together[k])


def test_without_torchao_it_is_said_how_to_get_it(modern, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"pip install 'mmwudao\[int8\]'"):
        quantise(deepcopy(modern))
