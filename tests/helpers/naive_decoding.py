"""Drawing that recomputes everything for every code: what `generate_codes` must agree with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from generation.drawing.logits import draw_noise, guide, sample
from generation.drawing.sampling import SamplingOptions
from generation.rows.draw import prompt_row, row_positions
from generation.rows.row import COMMANDS_IN_ROW
from generation.transformer.model import Transformer


@torch.inference_mode()
def naive_generate_codes(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    options: SamplingOptions | None = None,
    *,
    grid: tuple[int, int] = (16, 16),
    given_codes: Tensor | None = None,
) -> Tensor:
    """What `generate_codes` must agree with: no cache, no padding, no batch; the whole row again for every code."""
    options = options or SamplingOptions()
    unknown = torch.full((len(prompts), *grid), -1)
    given = (unknown if given_codes is None else given_codes).flatten(1)
    device = model.embed.weight.device
    pictures = []
    for row, text, seed in zip(given.tolist(), prompts, seeds, strict=True):
        codes: list[int] = []
        noise = draw_noise(seed, grid[0] * grid[1], model.config.num_image_codes).to(device)
        for code in row:
            if code >= 0:
                codes.append(code)
                continue
            logits = _naive_logits(model, text, codes, grid)
            if options.guidance != 1:
                logits = guide(torch.cat([logits, _naive_logits(model, [], codes, grid)]), options.guidance)
            codes.append(int(sample(logits, noise[len(codes)][None], options)))
        pictures.append(torch.tensor(codes, device=device).view(grid))
    return torch.stack(pictures)


def _naive_logits(model: Transformer, text: Sequence[int], codes: list[int], grid: tuple[int, int]) -> Tensor:
    config, device = model.config, model.embed.weight.device
    prompt = prompt_row(config.vocabulary, text, grid, config.max_text)
    row = torch.tensor([prompt + codes], device=device)
    num_text = len(prompt) + 1 - COMMANDS_IN_ROW
    positions = row_positions(num_text, grid, config.max_text, config.position_kind)[: row.shape[1]]
    hidden = model(row, positions.unsqueeze(0).to(device))
    return model.logits(hidden[:, -1], image_only=True).float()
