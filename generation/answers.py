"""Questions about pictures to answers: the likeliest text, or the likeliest of a closed list.

Both read rows of the kind "answer" (`generation.rows.answer`). Shapes: h x w codes in a picture, W beams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from generation.captions import Description, OnStep, TextSearch, allowed_texts
from generation.rows.answer import AnswerRows
from generation.rows.row import collate
from generation.transformer.model import Transformer

SCORED = 64  # answers in one row


@torch.inference_mode()
def answer(
    model: Transformer,
    codes: Tensor,
    question: Sequence[int],
    *,
    beams: int = 1,
    max_pieces: int | None = None,
    on_step: OnStep | None = None,
) -> list[Description]:
    """The likeliest answers that beam search finds to a question about `codes` [h, w], best first, at most `beams`.

    `question` are raw text pieces, language included; a `Prompt` of them brings the picture's vector, for a generator
    that reads such. One beam is greedy search. An answer is never empty, and has at most `max_pieces` pieces. By its
    probability alone: answers are compared as they are, not by the piece. `on_step` is called before every piece; an
    exception that it raises stops the search. Raises `ValueError` for codes that do not fit, or fewer than one beam.
    """
    rows = AnswerRows(model.config)
    room = min(max_pieces or model.config.max_text, rows.room(question))
    if beams < 1 or room < 1:
        raise ValueError(f"beams={beams} and {room} pieces of an answer: both must be at least 1")
    search = TextSearch(rows, model, codes, question, room)
    scores = torch.zeros(1, device=search.texts.device)
    found: list[Description] = []
    for step in range(room + 1):
        if on_step is not None:
            on_step()
        totals = scores[:, None] + search.next_log_probabilities()
        if step == 0:
            totals[:, search.end] = -torch.inf
        if step == room:  # what is not over is over now
            found += search.descriptions(totals[:, search.end])
            break
        scores, best = totals.flatten().topk(min(beams, int(totals.isfinite().sum())))
        ended = best % search.padded_size == search.end
        found += search.descriptions(scores[ended], best[ended] // search.padded_size)
        found = sorted(found, key=lambda text: -text.log_probability)[:beams]
        scores, best = scores[~ended], best[~ended]
        if not len(best) or (len(found) == beams and float(scores[0]) <= found[-1].log_probability):
            break
        search.follow(best)
    return sorted(found, key=lambda text: -text.log_probability)[:beams]


@torch.inference_mode()
def answer_log_probabilities(
    model: Transformer,
    codes: Tensor,
    question: Sequence[int],
    answers: Sequence[Sequence[int]],
    vector: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Log probability (nats) of each of `answers`, raw text pieces, and its end: [n], float32, on the CPU.

    `vector` [1, C] is the picture's, for a generator that reads such. `on_step` is called before every 64 answers.
    Raises `ValueError` for no answer.
    """
    if not answers:
        raise ValueError("no answer to choose from: give at least one")
    rows, vocab, device = AnswerRows(model.config), model.config.vocabulary, model.embed.weight.device
    found = []
    for start in range(0, len(answers), SCORED):
        if on_step is not None:
            on_step()
        some = answers[start : start + SCORED]
        batch = collate(vocab, [rows.row([(question, one) for one in some], codes.cpu())]).to(device)
        assert batch.segments is not None
        features = None if vector is None else vector.to(device).expand(len(some), -1)
        learned = batch.weights > 0
        hidden = model(batch.tokens, batch.positions, segments=batch.segments, features=features)[learned]
        logits = model.logits(hidden).float() + allowed_texts(vocab, device)
        told = logits.log_softmax(-1).gather(-1, batch.targets[learned][:, None])[:, 0]
        sums = torch.zeros(len(some), device=device).index_add_(0, batch.segments[learned] - 1, told)
        found.append(sums.cpu())
    return torch.cat(found)
