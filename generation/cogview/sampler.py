"""CogView's own sampler, on our KV cache: rows with given and missing tokens, super-resolution, caption scores.

It differs from `generation.drawing.decoding` in three ways: in which tokens may follow (`forbidden_ids`), in the
positions after [ROI2], and in that tokens may be given anywhere. Shapes: R rows, L tokens of a row, V vocabulary
(padded).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from generation.drawing.engines import make_cache
from generation.drawing.logits import filter_logits
from generation.drawing.sampling import SamplingOptions
from generation.rows.vocabulary import Vocabulary
from generation.transformer.cache import KVCache
from generation.transformer.model import Transformer, evaluation

MEMORY = 2048  # tokens that a new one looks back on, in the original's scripts
# (row block, column block, lines) of the super-resolution windows, in the order in which they are drawn
WINDOWS = (
    *((0, 0, 18), (0, 1, 30), (0, 2, 30)),
    *((1, 1, 30), (1, 0, 30), (1, 2, 30)),
    *((2, 0, 32), (2, 1, 32), (2, 2, 32)),
)

OnStep = Callable[[Tensor, Tensor], None]


def forbidden_ids(vocab: Vocabulary, given: Sequence[int]) -> Tensor:
    """Which ids [V] may not follow the tokens `given`: True is forbidden. The last marker among them decides.

    Before any, image codes; after [BOI1] or [BOI2] everything but image codes; after [EOI1] or [EOI2] everything but
    text pieces. Padding ids are ids like any other.
    """
    begin = {vocab.command("[BOI1]"), vocab.command("[BOI2]")}
    end = {vocab.command("[EOI1]"), vocab.command("[EOI2]")}
    marker = next((token for token in reversed(given) if token in begin | end), None)
    ids = torch.arange(vocab.padded_size)
    image = ids < vocab.num_image_codes
    if marker is None:
        return image
    if marker in begin:
        return ~image
    return image | (ids >= vocab.text_range.stop)


def step_probabilities(logits: Tensor, forbidden: Tensor, options: SamplingOptions) -> Tensor:
    """Probabilities [R, V] of the next token: forbidden ids out, temperature, top-k (ties kept), top-p, softmax."""
    logits = logits.float().masked_fill(forbidden, -torch.inf)
    if options.temperature == 0:
        best = logits == logits.amax(-1, keepdim=True)
        return best.float() / best.sum(-1, keepdim=True)
    return filter_logits(logits, options).softmax(-1)


@torch.inference_mode()
def fill_sequence(
    model: Transformer,
    row: Sequence[int] | Tensor,
    options: SamplingOptions | None = None,
    *,
    generator: torch.Generator | None = None,
    memory: int = MEMORY,
    on_step: OnStep | None = None,
) -> Tensor:
    """Fill the gaps of `row` [L]: all rows [n, L] int64, on the CPU. -1 is a gap; -n a gap filled in n rows.

    The first gap of n draws n tokens with replacement, after that each row draws for itself; at a given token after
    gaps only the row with the highest summed log probability stays. A token looks back on the last `memory` tokens at
    most. `generator` is a CPU generator, the global one if not given. `on_step(logits, probabilities)`, both [R, V],
    is called at every gap.

    Raises `ValueError` for a row that starts with a gap, ids outside the vocabulary, guidance, a number of rows that
    changes between two given tokens, and a row with more positions than the model has.
    """
    options = options or SamplingOptions()
    ids = [int(token) for token in row]
    vocab = model.config.vocabulary
    _check_row(model, ids, options, memory)
    device = model.embed.weight.device
    cache = make_cache("modules", model, torch.zeros(1, len(ids), dtype=torch.bool))
    tokens = torch.empty(1, 0, dtype=torch.int64)  # [R, tokens so far]
    scores = torch.zeros(1)  # [R], of the gaps since the last given token
    given: list[int] = []
    restart: int | None = None  # the last [ROI2]
    forbidden = forbidden_ids(vocab, given)
    with evaluation(model):
        for index, wanted in enumerate(ids):
            if wanted >= 0:
                if len(tokens) > 1:
                    best = scores.argmax().view(1)
                    tokens = tokens[best]
                    cache.take_rows(best.to(device))
                scores = torch.zeros(1)
                tokens = torch.cat([tokens, torch.tensor([[wanted]])], dim=1)
                given.append(wanted)
                if wanted in vocab.command_range:
                    forbidden = forbidden_ids(vocab, given)
                if wanted == vocab.command("[ROI2]"):
                    restart = index
                continue
            logits = _next_logits(model, tokens, cache, restart, memory)
            probabilities = step_probabilities(logits, forbidden, options)
            if on_step is not None:
                on_step(logits, probabilities)
            if len(tokens) == -wanted:
                drawn = torch.multinomial(probabilities, 1, generator=generator)  # [R, 1]
            else:
                drawn = torch.multinomial(probabilities, -wanted, replacement=True, generator=generator).T
                copies = torch.zeros(-wanted, dtype=torch.int64)
                tokens, scores, probabilities = tokens[copies], scores[copies], probabilities[copies]
                cache.take_rows(copies.to(device))
            scores = scores + probabilities.gather(1, drawn).squeeze(1).log()
            tokens = torch.cat([tokens, drawn], dim=1)
    return tokens


def _next_logits(model: Transformer, tokens: Tensor, cache: KVCache, restart: int | None, memory: int) -> Tensor:
    """Feed what the cache has not seen of `tokens` [R, t]; logits [R, V] (CPU, float32) of the token after them."""
    device = model.embed.weight.device
    cache.hide_before(cache.used - memory)
    positions = torch.arange(cache.used, tokens.shape[1])
    if restart is not None:
        # [ROI2] itself keeps its absolute position, unlike in finetuning: the published sampler's rule
        positions = torch.where(positions > restart, positions - restart, positions)
    fresh = tokens[:, cache.used :]
    hidden = model(fresh.to(device), positions.expand(len(tokens), -1).to(device), cache)
    return model.logits(hidden[:, -1]).float().cpu()


def _check_row(model: Transformer, ids: list[int], options: SamplingOptions, memory: int) -> None:
    vocab = model.config.vocabulary
    if not ids or ids[0] < 0:
        raise ValueError("a row must start with a given token")
    if max(ids) >= vocab.padded_size:
        raise ValueError(f"the row holds the id {max(ids)}; this model has {vocab.padded_size}")
    if model.config.position != "sequence" or options.guidance != 1:
        raise ValueError("this sampler is for CogView models: 1-D positions, no guidance (guidance=1)")
    if memory < 1:
        raise ValueError(f"memory must be at least 1 token, not {memory}")
    restart, rows = 0, 1
    for index, token in enumerate(ids):
        if token >= 0:
            rows = 1
        elif rows not in (1, -token):
            raise ValueError(f"the number of rows changes from {rows} to {-token} without a given token between")
        else:
            rows = -token
        if index - restart >= model.config.num_positions:
            raise ValueError(
                f"the row needs position {index - restart}; this model has 0..{model.config.num_positions - 1}"
            )
        restart = index if token == vocab.command("[ROI2]") else restart


def magnify(
    model: Transformer,
    text_part: Sequence[int] | Tensor,
    codes: Tensor,
    options: SamplingOptions | None = None,
    *,
    generator: torch.Generator | None = None,
    on_window: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Super-resolution (section 3.2 of the paper): `codes` [32, 32] to [64, 64], by nine overlapping windows.

    `text_part` is `[ROI1] text [BASE] [BOI1]`. Each window shows the model 16 x 16 codes and has it draw their
    32 x 32, of which those of earlier windows are given. `on_window(k, codes)` is called after window k with the
    codes so far, -1 where none is drawn yet. Raises `ValueError` for codes of another shape.
    """
    if tuple(codes.shape) != (32, 32):
        raise ValueError(f"magnify takes 32x32 codes, not {list(codes.shape)}")
    vocab = model.config.vocabulary
    head = [int(token) for token in text_part]
    between = [vocab.command(name) for name in ("[EOI1]", "[ROI2]", "[POS0]", "[BASE]", "[BOI2]")]
    result = torch.full((64, 64), -1)
    for window, (i, j, lines) in enumerate(WINDOWS):
        small = codes[8 * i : 8 * i + 16, 8 * j : 8 * j + 16].flatten().tolist()
        large = result[16 * i : 16 * i + lines, 16 * j : 16 * j + 32]  # a view
        row = [*head, *small, *between, *large.flatten().tolist()]
        filled = fill_sequence(model, row, options, generator=generator)
        large.copy_(filled[0, -large.numel() :].view_as(large))
        if on_window is not None:
            on_window(window, result)
    return result


@torch.inference_mode()
def caption_scores(model: Transformer, rows: Tensor) -> Tensor:
    """How likely the text of each row [B, L] is for its picture: summed log probabilities [B], float32, on the CPU.

    Rows are `[BASE] [BOI1] codes [EOI1] [ROI1] text`, all with [ROI1] at the same place. Image codes are left out of
    the softmax. Inverse prompting (Zou et al. 2021), the paper's post-selection; not divided by the length, so compare
    pictures for one text rather than texts. Raises `ValueError` for rows of another form.
    """
    vocab = model.config.vocabulary
    if rows.ndim != 2:
        raise ValueError(f"rows must be [B, L], not {list(rows.shape)}")
    marks = rows == vocab.command("[ROI1]")
    if not (marks.sum(dim=1) == 1).all() or not (marks == marks[:1]).all():
        raise ValueError("every row needs one [ROI1], all at the same place")
    start = int(marks[0].int().argmax())
    if start + 1 >= rows.shape[1]:
        raise ValueError("there is no text after [ROI1] to score")
    device = model.embed.weight.device
    with evaluation(model):
        positions = torch.arange(rows.shape[1]).expand(len(rows), -1)
        hidden = model(rows.to(device), positions.to(device))  # the last token too: it counts for the norms' maximum
        logits = model.logits(hidden[:, start:-1]).float().cpu()  # [B, text, V]
    logits[..., : vocab.num_image_codes] = -torch.inf
    text = rows[:, start + 1 :].cpu().unsqueeze(-1)
    return logits.log_softmax(-1).gather(-1, text).squeeze(-1).sum(dim=1)
