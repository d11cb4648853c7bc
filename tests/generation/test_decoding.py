from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from generation.drawing import blocks, decoding
from generation.drawing.blocks import BLOCK_ROWS, block_rows, blocks_together
from generation.drawing.decoding import count_steps, generate_codes
from generation.drawing.engines import Engine, make_cache, make_step
from generation.drawing.logits import guide, sample
from generation.drawing.prompts import pad_prompts, prefill
from generation.drawing.sampling import SamplingOptions
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from tests.helpers.generators import GRID, PRESETS, PROMPTS, SEEDS, make_model
from tests.helpers.naive_decoding import naive_generate_codes


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by more threads, and lose a lot on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=PRESETS)
def model(request) -> Transformer:
    return make_model(PRESETS[request.param])


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def wide_model(request) -> Transformer:
    """Wide enough for the matrix kernels of real models, tails included."""
    config = TransformerConfig.modern(
        num_image_codes=500, num_text_pieces=50, width=192, depth=3, heads=3, max_text=12, grid=(6, 6)
    )
    return make_model(config).to(request.param)


GREEDY = SamplingOptions(temperature=0)
RANDOM = SamplingOptions(temperature=0.9, top_k=20, top_p=0.95)


def test_a_training_in_bfloat16_draws_as_the_model_alone(wide_model):
    prompts, seeds = [[1, 2], [3]], [4, 5]
    alone = generate_codes(wide_model, prompts, seeds, RANDOM, grid=(3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(generate_codes(wide_model, prompts, seeds, RANDOM, grid=(3, 3)), alone)


@pytest.mark.parametrize("options", [GREEDY, RANDOM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_cached_decoding_draws_what_recomputing_draws(model, options, guidance):
    options = replace(options, guidance=guidance)
    prompts, seeds = PROMPTS[:4], SEEDS[:4]
    codes = generate_codes(model, prompts, seeds, options, grid=GRID)
    assert codes.shape == (4, 4, 4)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, naive_generate_codes(model, prompts, seeds, options, grid=GRID))


def test_a_smaller_grid_and_a_prefix(model):
    given = torch.tensor([[[3, 1, 4], [-1, -1, -1]], [[1, 5, 9], [-1, -1, -1]]])
    arguments = (model, PROMPTS[:2], SEEDS[:2], SamplingOptions(guidance=2.0))
    codes = generate_codes(*arguments, grid=(2, 3), given_codes=given)
    assert codes.shape == (2, 2, 3)
    assert torch.equal(codes[:, 0], given[:, 0])
    assert torch.equal(codes, naive_generate_codes(*arguments, grid=(2, 3), given_codes=given))


def test_given_codes_between_drawn_ones(model):
    given = torch.full((2, 4, 4), -1)
    given[0, :, :2] = 7
    given[1, 1:3] = 9
    arguments = (model, PROMPTS[:2], SEEDS[:2], SamplingOptions(guidance=2.0))
    codes = generate_codes(*arguments, grid=GRID, given_codes=given)
    assert torch.equal(codes[given >= 0], given[given >= 0])
    assert torch.equal(codes, naive_generate_codes(*arguments, grid=GRID, given_codes=given))
    assert (given < 0).any()  # the caller's tensor is not the one that is filled


def test_a_picture_given_whole_is_returned(model):
    whole = torch.arange(16).view(1, 4, 4)
    assert torch.equal(generate_codes(model, PROMPTS[:1], SEEDS[:1], grid=GRID, given_codes=whole), whole)


def test_a_pictures_own_start_gives_the_picture_again():
    model = make_model(PRESETS["modern"])
    whole = generate_codes(model, PROMPTS[:3], SEEDS[:3], grid=GRID)
    given = whole.clone()
    given.flatten(1)[:, 7:] = -1
    again = generate_codes(model, PROMPTS[:3], SEEDS[:3], grid=GRID, given_codes=given)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_an_image_does_not_depend_on_its_batch(wide_model, guidance):
    options = SamplingOptions(top_k=300, guidance=guidance)
    whole = generate_codes(wide_model, PROMPTS, SEEDS, options, grid=(6, 6))
    assert torch.equal(generate_codes(wide_model, PROMPTS, SEEDS, options, grid=(6, 6)), whole)
    for some in ([5], [11, 2], [3, 9, 0, 7, 4]):
        prompts, seeds = [PROMPTS[i] for i in some], [SEEDS[i] for i in some]
        assert torch.equal(generate_codes(wide_model, prompts, seeds, options, grid=(6, 6)), whole[some])
    assert not torch.equal(whole[0], whole[4])  # one prompt, two seeds


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_do_not_depend_on_the_row_or_its_neighbours(wide_model, threads):
    """Stricter than the codes: the same bits, in any row of a block, whatever the other rows hold."""
    torch.set_num_threads(threads)
    config = wide_model.config

    def logits(texts):
        prompts = pad_prompts(config, texts, (6, 6))
        kind = Engine().resolved(wide_model)
        assert kind == "fused"
        cache = make_cache(kind, wide_model, prompts.hidden)
        first = prefill(wide_model, prompts, cache)
        step = make_step(kind, wide_model, prompts.code_positions, cache)
        return torch.cat([first, step(torch.full((len(texts),), 7), 0)], 1)

    rows = [PROMPTS[i % len(PROMPTS)] for i in range(BLOCK_ROWS)]
    with torch.inference_mode():
        block = logits(rows)
        assert torch.equal(logits(rows[5:] + rows[:5]), block.roll(-5, 0))
        assert torch.equal(logits([rows[3]] * BLOCK_ROWS), block[3:4].expand_as(block))


def test_a_small_block_is_used_only_where_the_trial_finds_equal_bits(monkeypatch):
    model = make_model(PRESETS["modern"])
    whole = generate_codes(model, PROMPTS[:1], SEEDS[:1], grid=GRID)
    sizes = []

    def unequal(model, rows, grid, *window):
        sizes.append(rows)
        return torch.full((rows, 5), float(rows))

    monkeypatch.setattr(blocks, "_trials", {})
    monkeypatch.setattr(blocks, "_trial", unequal)
    assert block_rows(model, 3, GRID) == BLOCK_ROWS
    assert block_rows(model, 3, GRID) == BLOCK_ROWS
    assert sizes == [16, 4, 6, 8, 12]  # each size once
    assert torch.equal(generate_codes(model, PROMPTS[:1], SEEDS[:1], grid=GRID), whole)

    monkeypatch.setattr(blocks, "_trials", {})
    monkeypatch.setattr(blocks, "_trial", lambda model, rows, grid, window, kind: torch.ones(rows, 5))
    assert [block_rows(model, needed, GRID) for needed in (1, 2, 3, 4, 5, 8, 9, 16)] == [1, 2, 4, 4, 6, 8, 12, 16]

    monkeypatch.setattr(blocks, "_trials", {})
    monkeypatch.setattr(blocks, "_trial", lambda model, rows, *_: torch.arange(rows)[:, None])
    assert block_rows(model, 1, GRID) == BLOCK_ROWS, "rows that differ within a block agree with nothing"


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_two_full_blocks_are_drawn_at_once_with_the_same_bits(wide_model, guidance):
    """Where this CPU computes them; elsewhere they are drawn one after the other."""
    options, told = SamplingOptions(guidance=guidance), []
    size = BLOCK_ROWS if guidance == 1 else BLOCK_ROWS // 2
    prompts, seeds = [PROMPTS[k % len(PROMPTS)] for k in range(2 * size + 1)], list(range(2 * size + 1))
    found = generate_codes(
        wide_model, prompts, seeds, options, grid=(3, 3), on_token=lambda step, codes: told.append(step)
    )
    expected = generate_codes(wide_model, prompts, seeds, options, grid=(3, 3), engine=Engine(images=size))
    assert torch.equal(found, expected)
    together = blocks_together(wide_model, (3, 3), kind="fused")
    assert told == [*range(together, 19, together), *range(19, 28)]
    assert told[-1] == count_steps(2 * size + 1, options, (3, 3))


def test_blocks_go_together_only_where_it_is_sure(monkeypatch):
    model = make_model(PRESETS["modern"])

    def trial(equal):
        monkeypatch.setattr(blocks, "_trials", {})
        numbers = lambda model, rows, *_: torch.full((rows, 5), float(equal or rows))  # noqa: E731
        monkeypatch.setattr(blocks, "_trial", numbers)

    trial(equal=False)
    assert blocks_together(model, GRID) == 1
    trial(equal=True)
    assert blocks_together(model, GRID) == 2
    assert blocks_together(model, GRID, window=8) == 1
    assert blocks_together(model, GRID, kind="compile") == 1
    monkeypatch.setattr(blocks, "free_host_bytes", lambda: 1000)
    assert blocks_together(model, GRID) == 1, "little memory is free"
    monkeypatch.setattr(blocks, "free_host_bytes", lambda: None)
    monkeypatch.setattr(blocks, "MOST_TOGETHER", 1)
    assert blocks_together(model, GRID) == 1, "a large block"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_pictures_logits_are_the_same_bits_alone_and_in_company(wide_model, threads):
    """Alone, and among two, three and eight: the same codes, and the same bits of every logit that led to them."""
    torch.set_num_threads(threads)
    seen: dict[int, list[torch.Tensor]] = {}

    def draw(count):
        """Codes, with the logits [N] of picture 0 before each step in `seen`."""
        seen[count] = []

        def keep(logits, *rest):
            seen[count].append(logits[0].clone())
            return sample(logits, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "sample", keep)
            return generate_codes(wide_model, PROMPTS[:count], SEEDS[:count], RANDOM, grid=(6, 6))

    alone = draw(1)
    for count in (2, 3, 8):
        assert torch.equal(draw(count)[0], alone[0])
        assert torch.equal(torch.stack(seen[count]), torch.stack(seen[1]))
    assert torch.stack(seen[1]).shape == (36, 500)


def test_guidance_1_is_no_guidance_and_0_ignores_the_prompt(model, monkeypatch):
    plain = generate_codes(model, PROMPTS[:2], SEEDS[:2], SamplingOptions(), grid=GRID)
    with monkeypatch.context() as patch:  # guidance 1 through the guided pass, which 1 itself skips
        patch.setattr(decoding, "guide", lambda logits, guidance: guide(logits, 1.0))
        guided = generate_codes(model, PROMPTS[:2], SEEDS[:2], SamplingOptions(guidance=1.5), grid=GRID)
    assert torch.equal(guided, plain)
    empty = generate_codes(model, [[], []], SEEDS[:2], SamplingOptions(), grid=GRID)
    ignored = generate_codes(model, PROMPTS[:2], SEEDS[:2], SamplingOptions(guidance=0.0), grid=GRID)
    assert torch.equal(ignored, empty)
    assert not torch.equal(plain, empty)


def test_only_image_codes_are_drawn_even_if_others_are_likelier():
    model = make_model(PRESETS["learned-2d"])
    with torch.no_grad():
        model.head.weight[32:] *= 100
    for temperature in (0.0, 1.0, 50.0):
        codes = generate_codes(model, PROMPTS, SEEDS, SamplingOptions(temperature=temperature), grid=GRID)
        assert 0 <= codes.min()
        assert codes.max() < 32


@pytest.mark.parametrize("options", [GREEDY, RANDOM, SamplingOptions(temperature=1.0)], ids=["greedy", "top", "all"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("window", [2, 5, 16, 40])
def test_windows_draw_what_one_code_after_the_other_draws(model, options, guidance, window):
    one = replace(options, guidance=guidance)
    expected = generate_codes(model, PROMPTS[:5], SEEDS[:5], one, grid=GRID)
    assert torch.equal(generate_codes(model, PROMPTS[:5], SEEDS[:5], replace(one, window=window), grid=GRID), expected)


def test_windows_keep_what_is_given(model):
    expected = generate_codes(model, PROMPTS[:3], SEEDS[:3], RANDOM, grid=GRID)
    given = torch.full((3, *GRID), -1)
    given[:, 0, :2] = 7  # in all of them
    given[0, 0, 2:] = 8
    given[1, 2, 1] = 9
    expected = generate_codes(model, PROMPTS[:3], SEEDS[:3], RANDOM, grid=GRID, given_codes=given)
    told = []
    found = generate_codes(
        model, PROMPTS[:3], SEEDS[:3], replace(RANDOM, window=6), grid=GRID, given_codes=given,
        on_token=lambda step, codes: told.append((step, int((codes >= 0).all(dim=0).sum()))),
    )  # fmt: skip
    assert torch.equal(found, expected)
    assert told[-1] == (14, 16)
    assert len(told) < 14
    assert all(step + 2 <= known for step, known in told)
    assert [step for step, _ in told] == sorted({step for step, _ in told})


def test_windows_take_fewer_passes(monkeypatch):
    model = make_model(PRESETS["cogview"])
    block_rows(model, 1, GRID, 8)  # its trial runs the model, too
    passes = []
    forward = Transformer.forward

    def counted(self, *inputs, **options):
        passes.append(0)
        return forward(self, *inputs, **options)

    monkeypatch.setattr(Transformer, "forward", counted)
    generate_codes(model, PROMPTS[:1], SEEDS[:1], replace(GREEDY, window=8), grid=GRID)
    assert len(passes) <= 12  # instead of 16


def test_a_picture_by_windows_is_the_same_in_any_company(wide_model):
    options, grid = SamplingOptions(temperature=0.9, guidance=3.0, window=7), (6, 6)
    together = generate_codes(wide_model, PROMPTS[:9], SEEDS[:9], options, grid=grid)
    for k in (0, 4, 8):
        assert torch.equal(generate_codes(wide_model, [PROMPTS[k]], [SEEDS[k]], options, grid=grid)[0], together[k])


def test_progress_is_told_step_by_step():
    model = make_model(PRESETS["modern"])
    options, told = SamplingOptions(guidance=2.0), []

    def note(step, codes):
        told.append((step, int((codes >= 0).sum()), tuple(codes.shape)))

    codes = generate_codes(model, PROMPTS[:9], SEEDS[:9], options, grid=GRID, on_token=note)
    assert len(told) == count_steps(9, options, GRID) == 2 * 16  # eight guided images a block
    assert [step for step, _, _ in told] == list(range(1, 33))
    assert told[0][1:] == (8, (9, 4, 4))
    assert told[15][1] == 8 * 16
    assert told[-1][1] == codes.numel()
    assert count_steps(9, SamplingOptions(), GRID, known=6) == 10


def test_training_mode_is_put_back_and_dropout_is_off():
    model = make_model(TransformerConfig.modern(
        num_image_codes=32, num_text_pieces=50, width=64, depth=2, heads=4, max_text=6, grid=GRID, dropout=0.5
    )).train()  # fmt: skip
    first = generate_codes(model, PROMPTS[:2], SEEDS[:2], grid=GRID)
    assert model.training
    assert torch.equal(generate_codes(model, PROMPTS[:2], SEEDS[:2], grid=GRID), first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "at least one"),
        ({"seeds": [1]}, "one seed a prompt"),
        ({"grid": (5, 4)}, "up to 4x4"),
        ({"prompts": [[50], [1]]}, "0..49"),
        ({"given_codes": torch.zeros(2, 17)}, "given_codes"),
        ({"given_codes": torch.full((2, 4, 4), 32)}, r"0\.\.31"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    arguments = {"prompts": [[1], [2]], "seeds": [1, 2], "grid": GRID, **changes}
    with pytest.raises(ValueError, match=message):
        generate_codes(make_model(PRESETS["modern"]), **arguments)
