"""Pictures to text: the best caption by beam search, and how likely a given one is.

For rows with the image first (`generation.rows.describe`): a generator that learned both directions, or CogView's
caption model, whose text has no end mark and is scored by `generation.cogview.sampler.caption_scores`.
Beam search alone finds what the generator thinks; with a judge beside it, what a judge of pictures and texts, such as
retrieval towers, finds true of the picture, too. Shapes: n pictures of h x w codes, W beams, V vocabulary (padded).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from generation.drawing.engines import make_cache
from generation.drawing.logits import filter_logits
from generation.drawing.sampling import SamplingOptions
from generation.rows.describe import caption_prompt_row, caption_row, caption_row_positions
from generation.rows.row import collate
from generation.rows.vocabulary import Vocabulary
from generation.transformer.model import KVCache, Transformer

SLACK = 4.0  # nats

OnStep = Callable[[], None]


@dataclass(frozen=True)
class Description:
    """Raw text pieces after the given ones, and their log probability (nats, the end mark included)."""

    pieces: tuple[int, ...]
    log_probability: float

    @property
    def score(self) -> float:
        """Log probability a piece: by the sum alone, the shortest texts would win."""
        return self.log_probability / (len(self.pieces) + 1)


@torch.inference_mode()
def describe(
    model: Transformer,
    codes: Tensor,
    start: Sequence[int] = (),
    *,
    beams: int = 4,
    max_pieces: int | None = None,
    ends: bool = True,
    on_step: OnStep | None = None,
) -> list[Description]:
    """The `beams` texts with the best scores for `codes` [h, w] that beam search finds, best first; none is empty.

    `start` are raw text pieces that every text begins with and that are not returned. With `ends`, a text is over at
    [SEP]; without, it has `max_pieces` pieces (default: what the model reads). One beam is greedy search. `on_step` is
    called before every piece: an exception it raises stops the search.
    Raises `ValueError` for codes that do not fit, less than one beam, or a start that leaves no room.
    """
    room = min(max_pieces or model.config.max_text, model.config.max_text) - len(start)
    if beams < 1 or room < 1:
        raise ValueError(f"beams={beams} and {room} pieces of text to be found: both must be at least 1")
    vocab, device = model.config.vocabulary, model.embed.weight.device
    cache, hidden, positions = _read(model, codes, start, room)
    allowed, end = _allowed(vocab, ends, device), vocab.command("[SEP]")
    found: list[Description] = []
    texts = torch.empty(1, 0, dtype=torch.int64, device=device)  # [W, pieces so far]
    scores = torch.zeros(1, device=device)
    for step in range(room + 1):
        if on_step is not None:
            on_step()
        logits = model.logits(hidden[:, -1]).float() + allowed
        totals = scores[:, None] + logits.log_softmax(-1)  # [W, V]
        if ends:
            if step:
                found += _descriptions(texts, totals[:, end], vocab.num_image_codes)
            totals[:, end] = -torch.inf
        if step == room:
            break
        scores, best = totals.flatten().topk(min(beams, int(totals.isfinite().sum())))
        parents, pieces = best // vocab.padded_size, best % vocab.padded_size
        texts = torch.cat([texts[parents], pieces[:, None]], dim=1)
        found = sorted(found, key=lambda text: -text.score)[:beams]
        if len(found) == beams and float(scores[0]) / (room + 1) < found[-1].score:
            break  # no text that goes on can do better, if all its other pieces were certain
        if step + 1 == room and not ends:
            break
        cache.take_rows(parents)
        hidden = model(pieces[:, None], positions[step].expand(len(pieces), 1, *positions.shape[1:]), cache)
    if not ends:
        found = _descriptions(texts, scores, vocab.num_image_codes)
    return sorted(found, key=lambda text: -text.score)[:beams]


@torch.inference_mode()
def describe_for_judge(
    model: Transformer,
    codes: Tensor,
    judge: Callable[[list[list[int]]], Tensor],
    start: Sequence[int] = (),
    *,
    beams: int = 32,
    judged: int = 256,
    nucleus: float = 0.98,
    on_step: OnStep | None = None,
) -> list[tuple[Description, float]]:
    """Texts for `codes` [h, w] that are likely to the model and good to a judge, with the sums of both, best first.

    Beam search in which a judge of pictures and texts has its say at every piece, as in MAGIC (Su et al. 2022,
    arXiv:2205.02655, section 3.2): of the `judged` likeliest ways to go on, the `beams` best are followed. The
    `judge` gives the texts that begin with `start`, told without it as raw pieces, log odds (nats) [n]. Pieces outside
    the model's `nucleus` (top-p) are not considered, so that the judge cannot lead the text into another language.
    Texts end at [SEP], and the model must have learned to describe so. `on_step` and `ValueError` as of `describe`.
    """
    room = model.config.max_text - len(start)
    if beams < 1 or judged < beams or room < 1:
        raise ValueError(f"beams={beams} of judged={judged}, and {room} pieces of text to be found: all at least 1")
    vocab, device = model.config.vocabulary, model.embed.weight.device
    cache, hidden, positions = _read(model, codes, start, room)
    allowed, end = _allowed(vocab, True, device), vocab.command("[SEP]")
    texts = torch.empty(1, 0, dtype=torch.int64, device=device)  # [W, pieces so far]
    likely, odds = torch.zeros(1, device=device), torch.zeros(1, device=device)
    found: list[tuple[Description, float]] = []
    for step in range(room + 1):
        if on_step is not None:
            on_step()
        steps = (model.logits(hidden[:, -1]).float() + allowed).log_softmax(-1)
        ended = likely + steps[:, end]
        if step:
            texts_ended = _descriptions(texts, ended, vocab.num_image_codes)
            found += zip(texts_ended, (ended + odds).tolist(), strict=True)
            found = sorted(found, key=lambda one: -one[1])[:beams]
        # what is to come can only cost probability; the judge may still gain, by less than this as a rule
        if step == room or (len(found) == beams and float((likely + odds).max()) + SLACK < found[0][1]):
            break
        steps[:, end] = -torch.inf
        totals = (likely[:, None] + filter_logits(steps, SamplingOptions(top_p=nucleus))).flatten()
        totals, best = totals.topk(min(judged, int(totals.isfinite().sum())))
        parents, pieces = best // vocab.padded_size, best % vocab.padded_size
        texts = torch.cat([texts[parents], pieces[:, None]], dim=1)
        odds = judge((texts - vocab.num_image_codes).tolist()).to(device)
        kept = (totals + odds).topk(min(beams, len(totals))).indices
        texts, likely, odds = texts[kept], totals[kept], odds[kept]
        cache.take_rows(parents[kept])
        hidden = model(texts[:, -1:], positions[step].expand(len(kept), 1, *positions.shape[1:]), cache)
    return found


def _read(model: Transformer, codes: Tensor, start: Sequence[int], room: int) -> tuple[KVCache, Tensor, Tensor]:
    """The cache after `codes` [h, w] and `start`, hidden states [1, T, D], positions of what follows."""
    config, device = model.config, model.embed.weight.device
    grid = (codes.shape[0], codes.shape[1])
    if grid[0] > config.grid[0] or grid[1] > config.grid[1]:
        raise ValueError(f"this model describes up to {config.grid[0]}x{config.grid[1]} codes, not {grid[0]}x{grid[1]}")
    row = torch.tensor([caption_prompt_row(config.vocabulary, codes, start)], device=device)
    given = row.shape[1]
    positions = caption_row_positions(len(start) + room, grid, config.max_text, config.position_kind).to(device)
    cache = make_cache("modules", model, torch.zeros(1, given + room, dtype=torch.bool))
    return cache, model(row, positions[:given].unsqueeze(0), cache), positions[given:]


def _allowed(vocab: Vocabulary, ends: bool, device: torch.device) -> Tensor:
    """What is added to logits [V]: 0 at text pieces and, with `ends`, at the end mark; minus infinity elsewhere."""
    allowed = torch.full((vocab.padded_size,), -torch.inf, device=device)
    allowed[vocab.text_range.start : vocab.text_range.stop] = 0
    if ends:
        allowed[vocab.command("[SEP]")] = 0
    return allowed


def _descriptions(texts: Tensor, scores: Tensor, first_piece: int) -> list[Description]:
    rows = (texts - first_piece).tolist()
    return [Description(tuple(row), score) for row, score in zip(rows, scores.tolist(), strict=True)]


@torch.inference_mode()
def caption_log_probabilities(model: Transformer, codes: Tensor, text: Sequence[int], start: int = 0) -> Tensor:
    """Log probability (nats) of `text` and its end for each picture of `codes` [n, h, w]: [n], float32, on the CPU.

    Inverse prompting (Zou et al. 2021, arXiv:2103.10685): pictures that say the prompt back suit it best. The first
    `start` of the raw text pieces are given, as a language tag is. Compare pictures for one text, not texts.
    """
    config, device = model.config, model.embed.weight.device
    rows = [caption_row(config.vocabulary, [text], one, config.max_text, config.position_kind) for one in codes.cpu()]
    batch = collate(config.vocabulary, rows).to(device)
    begin = batch.tokens.shape[1] - len(text[: config.max_text]) + start - 1  # its target is the first scored piece
    hidden = model(batch.tokens, batch.positions)[:, begin:]
    logits = model.logits(hidden).float()
    logits[..., : config.num_image_codes] = -torch.inf
    targets = batch.targets[:, begin:, None]
    return logits.log_softmax(-1).gather(-1, targets).sum(dim=(1, 2)).cpu()
