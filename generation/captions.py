"""Pictures to text: the best caption by beam search, and how likely a given caption is.

Both read rows of the kind "describe" (`generation.rows.describe`). They work with a generator that learned to draw and
to describe, and with CogView's caption model, whose text has no end mark and is scored by
`generation.cogview.sampler.caption_scores`. Beam search alone finds the texts that the generator finds likely; with a
judge, such as retrieval towers, it finds texts that fit the picture too.
Shapes: n pictures of h x w codes, W beams, V vocabulary (padded), D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from generation.drawing.engines import make_cache
from generation.drawing.logits import filter_logits
from generation.drawing.sampling import SamplingOptions
from generation.rows.base import Given, RowKind
from generation.rows.describe import DescribeRows, caption_row
from generation.rows.prompt import Prompt
from generation.rows.row import collate
from generation.rows.vocabulary import Vocabulary
from generation.transformer.model import Transformer

SLACK = 4.0  # nats

OnStep = Callable[[], None]
Judge = Callable[[list[list[int]]], Tensor]


@dataclass(frozen=True)
class Description:
    """Raw text pieces after the given ones, and their log probability (nats, the end mark included)."""

    pieces: tuple[int, ...]
    log_probability: float

    @property
    def score(self) -> float:
        """Log probability per piece: by the sum alone, the shortest texts would win."""
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

    `start` are raw text pieces that every text begins with and that are not returned; a `Prompt` of them brings the
    picture's vector, for a generator that reads such. With `ends`, a text is over at
    [SEP]; without, it has `max_pieces` pieces (default: the most that the model reads). One beam is greedy search.
    `on_step` is called before every piece; an exception that it raises stops the search.
    Raises `ValueError` for codes that do not fit, fewer than one beam, or a start that leaves no room.
    """
    room = min(max_pieces or model.config.max_text, model.config.max_text) - len(start)
    if beams < 1 or room < 1:
        raise ValueError(f"beams={beams} and {room} pieces of text to be found: both must be at least 1")
    search = TextSearch(DescribeRows(model.config), model, codes, start, room, ends)
    scores = torch.zeros(1, device=search.texts.device)
    found: list[Description] = []
    for step in range(room + 1 if ends else room):
        if on_step is not None:
            on_step()
        totals = scores[:, None] + search.next_log_probabilities()
        if ends:
            if step:
                found += search.descriptions(totals[:, search.end])
            totals[:, search.end] = -torch.inf
        if step == room:
            break
        scores, best = totals.flatten().topk(min(beams, int(totals.isfinite().sum())))
        search.follow(best)
        found = sorted(found, key=lambda text: -text.score)[:beams]
        if len(found) == beams and float(scores[0]) / (room + 1) < found[-1].score:
            break  # no longer text can score higher, even if all its other pieces were certain
    if not ends:
        found = search.descriptions(scores)
    return sorted(found, key=lambda text: -text.score)[:beams]


@torch.inference_mode()
def describe_for_judge(
    model: Transformer,
    codes: Tensor,
    judge: Judge,
    start: Sequence[int] = (),
    *,
    beams: int = 32,
    judged: int = 256,
    nucleus: float = 0.98,
    on_step: OnStep | None = None,
) -> list[tuple[Description, float]]:
    """Texts for `codes` [h, w] that are likely to the model and good to a judge, with the sums of both, best first.

    Beam search in which a judge of pictures and texts scores every piece, as in MAGIC (Su et al. 2022,
    arXiv:2205.02655, section 3.2): of the `judged` likeliest continuations, the `beams` best are followed. `judge`
    takes n texts as raw pieces without `start`, and returns their log odds (nats) [n]. Pieces outside the model's
    `nucleus` (top-p) are not considered, so that the judge cannot lead the text into another language.
    Texts end at [SEP], so the model must have learned to end them. `on_step` and `ValueError` as for `describe`.
    """
    room = model.config.max_text - len(start)
    if beams < 1 or judged < beams or room < 1:
        raise ValueError(f"beams={beams} of judged={judged}, and {room} pieces of text to be found: all at least 1")
    search = TextSearch(DescribeRows(model.config), model, codes, start, room)
    device = search.texts.device
    likely, odds = torch.zeros(1, device=device), torch.zeros(1, device=device)
    found: list[tuple[Description, float]] = []
    for step in range(room + 1):
        if on_step is not None:
            on_step()
        steps = search.next_log_probabilities()
        ended = likely + steps[:, search.end]
        if step:
            found += zip(search.descriptions(ended), (ended + odds).tolist(), strict=True)
            found = sorted(found, key=lambda one: -one[1])[:beams]
        # further pieces can only lower the probability; the judge may still add to the sum, by less than this as a rule
        if step == room or (len(found) == beams and float((likely + odds).max()) + SLACK < found[0][1]):
            break
        steps[:, search.end] = -torch.inf
        totals = (likely[:, None] + filter_logits(steps, SamplingOptions(top_p=nucleus))).flatten()
        totals, best = totals.topk(min(judged, int(totals.isfinite().sum())))
        odds = judge((search.continued(best) - search.first_piece).tolist()).to(device)
        kept = (totals + odds).topk(min(beams, len(totals))).indices
        likely, odds = totals[kept], odds[kept]
        search.follow(best[kept])
    return found


class TextSearch:
    """The texts that beam search follows for one picture, and the model's cache for them."""

    def __init__(
        self,
        rows: RowKind,
        model: Transformer,
        codes: Tensor,
        start: Sequence[int],
        room: int,
        ends: bool = True,
    ) -> None:
        """Read `codes` [h, w] and the raw text pieces `start`; texts will have `room` more pieces at most.

        `rows` say where the codes and the pieces go.

        Raises `ValueError` for a picture of more codes than the model knows.
        """
        config, device = model.config, model.embed.weight.device
        grid = (codes.shape[0], codes.shape[1])
        if grid[0] > config.grid[0] or grid[1] > config.grid[1]:
            known = f"{config.grid[0]}x{config.grid[1]}"
            raise ValueError(f"this model describes up to {known} codes, not {grid[0]}x{grid[1]}")
        vocab = config.vocabulary
        prompt = torch.tensor([rows.prompt(Given(start, grid, codes))], device=device)
        length = prompt.shape[1]
        positions = rows.positions(len(start) + room, grid).to(device)
        self.model, self.padded_size = model, vocab.padded_size
        self.first_piece, self.end = vocab.num_image_codes, vocab.command("[SEP]")
        self.texts = torch.empty(1, 0, dtype=torch.int64, device=device)  # [W, pieces so far], as ids of the vocabulary
        self._allowed = allowed_texts(vocab, device, ends)
        self._cache = make_cache("modules", model, torch.zeros(1, length + room, dtype=torch.bool))
        features = start.features.to(device) if isinstance(start, Prompt) and start.features is not None else None
        # [W, T, D]; T is 1 after the prompt
        self._hidden = model(prompt, positions[:length].unsqueeze(0), self._cache, features=features)
        self._positions = positions[length:]
        self._parents: Tensor | None = None  # [W], rows of the cache, where it lacks the last pieces

    def next_log_probabilities(self) -> Tensor:
        """Log probability of each piece that may follow each text, [W, V]; minus infinity for what is not text."""
        if self._parents is not None:
            self._cache.take_rows(self._parents)
            position = self._positions[self.texts.shape[1] - 1]
            positions = position.expand(len(self.texts), 1, *self._positions.shape[1:])
            self._hidden, self._parents = self.model(self.texts[:, -1:], positions, self._cache), None
        logits = self.model.logits(self._hidden[:, -1]).float() + self._allowed
        return logits.log_softmax(-1)

    def continued(self, best: Tensor) -> Tensor:
        """The texts [n, pieces + 1] that the places `best` [n] of a flattened [W, V] stand for."""
        return torch.cat([self.texts[best // self.padded_size], (best % self.padded_size)[:, None]], dim=1)

    def follow(self, best: Tensor) -> None:
        """Go on with the texts `continued(best)` alone."""
        self.texts, self._parents = self.continued(best), best // self.padded_size

    def descriptions(self, scores: Tensor, places: Tensor | None = None) -> list[Description]:
        """The texts, or those at `places` [n], with their log probabilities `scores` [W] or [n]."""
        texts = self.texts if places is None else self.texts[places]
        rows = (texts - self.first_piece).tolist()
        return [Description(tuple(row), score) for row, score in zip(rows, scores.tolist(), strict=True)]


def allowed_texts(vocab: Vocabulary, device: torch.device, ends: bool = True) -> Tensor:
    """A mask [V] to add to logits: 0 at text pieces and, with `ends`, at the end mark; minus infinity elsewhere."""
    allowed = torch.full((vocab.padded_size,), -torch.inf, device=device)
    allowed[vocab.text_range.start : vocab.text_range.stop] = 0
    if ends:
        allowed[vocab.command("[SEP]")] = 0
    return allowed


@torch.inference_mode()
def caption_log_probabilities(
    model: Transformer, codes: Tensor, text: Sequence[int], start: int = 0, features: Tensor | None = None
) -> Tensor:
    """Log probability (nats) of `text` and its end for each picture of `codes` [n, h, w]: [n], float32, on the CPU.

    This is inverse prompting (Zou et al. 2021, arXiv:2103.10685): the pictures that suit a prompt best are those that
    make it most likely. The first `start` of the raw text pieces are given, as a language tag is. `features` [n, C] are
    the pictures' vectors, for a generator that reads such. The figures compare pictures for one text, and not texts
    with each other.
    """
    config, device = model.config, model.embed.weight.device
    rows = [caption_row(config.vocabulary, [text], one, config.max_text, config.position_kind) for one in codes.cpu()]
    batch = collate(config.vocabulary, rows).to(device)
    begin = batch.tokens.shape[1] - len(text[: config.max_text]) + start - 1  # its target is the first scored piece
    vectors = None if features is None else features.to(device)
    hidden = model(batch.tokens, batch.positions, features=vectors)[:, begin:]
    logits = model.logits(hidden).float()
    logits[..., : config.num_image_codes] = -torch.inf
    targets = batch.targets[:, begin:, None]
    return logits.log_softmax(-1).gather(-1, targets).sum(dim=(1, 2)).cpu()
