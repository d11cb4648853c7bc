from __future__ import annotations

import math
import os
from collections import deque
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from data.config import ConfigError
from retrieval.towers.base import Tokens, Towers, unit
from retrieval.training.objectives import (
    Moco,
    Objective,
    ObjectiveConfig,
    build_objective,
    cross_entropy,
    near_both,
    pairs,
)

NAMES = ("moco", "clip", "siglip")


class ToyTowers(Towers):
    """Linear pictures of 2 x 2 pixels, and texts of a few of ten words."""

    kind = "toy"
    embed_dim = 6
    image_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6, affine=False, momentum=0.5))
        self.picture[1].eval()
        self.words = nn.EmbeddingBag(10, 6)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def train(self, mode: bool = True) -> ToyTowers:
        super().train(mode)
        self.picture[1].eval()  # else features would depend on how a batch is split
        return self

    @property
    def scale(self) -> Tensor:
        return self.logit_scale.exp()

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return unit(self.picture(pixels.flatten(1)))

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        return unit(self.words(tokens))


def toy(seed: int = 0) -> ToyTowers:
    torch.manual_seed(seed)
    return ToyTowers()


def toy_batch(count: int, seed: int, views: int = 1, concepts: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 3, 2, 2, generator=generator)
    tokens = torch.randint(10, (views * count, 3), generator=generator)
    return pixels, tokens, torch.randint(concepts, (count,), generator=generator)


def features(objective: Objective, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return objective.towers.encode_pixels(pixels), objective.towers.encode_tokens(tokens)


def test_clip_is_open_clips_where_each_pair_is_alone() -> None:
    objective = build_objective(toy(), ObjectiveConfig("clip", "negative", temperature=0.1))
    batch = toy_batch(7, 1)
    expected = ClipLoss()(*features(objective, *batch[:2]), objective.towers.scale)
    torch.testing.assert_close(objective(*batch)["loss"], expected)
    assert float(objective(*batch)["temperature"]) == pytest.approx(0.1)


def test_siglip_is_open_clips_where_each_pair_is_alone() -> None:
    objective = build_objective(toy(), ObjectiveConfig("siglip", "negative", temperature=0.1))
    batch = toy_batch(7, 1)
    expected = SigLipLoss()(*features(objective, *batch[:2]), objective.towers.scale, torch.tensor(-10.0))
    torch.testing.assert_close(objective(*batch)["loss"], expected)


@pytest.mark.parametrize("name", NAMES)
def test_same_concept(name: str) -> None:
    pixels, tokens, _ = toy_batch(6, 2)
    losses = {}
    for choice in ("positive", "left-out", "negative"):
        objective = build_objective(toy(), ObjectiveConfig(name, choice))  # type: ignore[arg-type]
        apart = objective(pixels, tokens, torch.arange(6))["loss"]
        losses[choice] = float(objective.eval()(pixels, tokens, torch.tensor([0, 0, 1, 1, 2, 3]))["loss"].detach())
        if choice == "negative":
            assert losses[choice] == pytest.approx(float(apart.detach()), rel=0.3)
    assert losses["left-out"] < losses["negative"], "a concept's other pictures count against nobody"
    assert len(set(losses.values())) == 3


def test_cross_entropy_with_several_positives() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.5, 4.0]])
    positive = torch.tensor([[True, True, False], [False, True, False]])
    counted = torch.tensor([[True, True, True], [True, True, False]])
    shares = [math.exp(x) / sum(math.exp(y) for y in (1, 2, 3)) for x in (1, 2)]
    expected = (-(math.log(shares[0]) + math.log(shares[1])) / 2 + math.log(2)) / 2
    assert float(cross_entropy(logits, positive, counted)) == pytest.approx(expected)


def test_two_captions_of_a_picture_are_both_right() -> None:
    objective = build_objective(toy(), ObjectiveConfig("clip", "negative"))
    pixels, tokens, _ = toy_batch(5, 3, views=2)
    images, texts = features(objective, pixels, tokens)
    logits = objective.towers.scale * images @ texts.T
    per_text = F.cross_entropy(logits.T, torch.arange(5).repeat(2))
    shares = logits.log_softmax(dim=1)
    per_image = -sum((shares[k, k] + shares[k, k + 5]) / 2 for k in range(5)) / 5
    torch.testing.assert_close(objective(pixels, tokens, torch.arange(5))["loss"], (per_text + per_image) / 2)


@pytest.mark.parametrize("top_k", [0, 2])
def test_moco_is_what_it_says(top_k: int) -> None:
    """Four steps against a plain loop over pairs, deques and parameters."""
    config = ObjectiveConfig("moco", "negative", queue=7, momentum=0.9, top_k=top_k)
    objective = build_objective(toy(), config).train()
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.5)
    slow = {name: p.detach().clone() for name, p in toy().named_parameters() if name != "logit_scale"}
    queue: deque[tuple[Tensor, Tensor]] = deque(maxlen=7)
    extra_positives = 0
    for step, count in enumerate((3, 4, 3, 5)):
        pixels, tokens, _ = toy_batch(count, 10 + step)
        labels = torch.arange(count) + 100 * step
        images, texts = (f.detach() for f in features(objective, pixels, tokens))
        for name in slow:
            slow[name] = 0.9 * slow[name] + 0.1 * objective.towers.get_parameter(name).detach()
        reference = toy()
        reference.load_state_dict({**reference.state_dict(), **slow})
        with torch.no_grad():
            image_keys, text_keys = reference.encode_pixels(pixels), reference.encode_tokens(tokens)
        scale = objective.towers.scale.detach()
        total = 0.0
        for k in range(count):
            near = set(range(len(queue)))
            for side, key in ((0, image_keys[k]), (1, text_keys[k])):
                order = sorted(range(len(queue)), key=lambda j: -float(queue[j][side] @ key))
                near &= set(order[:top_k])
            extra_positives += len(near)
            for query, keys, side in ((images[k], text_keys, 1), (texts[k], image_keys, 0)):
                logits = [float(scale * query @ key) for key in [*keys, *(pair[side] for pair in queue)]]
                normaliser = math.log(sum(math.exp(x) for x in logits))
                right = [k, *(count + j for j in near)]
                total += sum(normaliser - logits[j] for j in right) / len(right)
        loss = objective(pixels, tokens, labels)["loss"]
        assert float(loss.detach()) == pytest.approx(total / count / 2, rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue.extend(zip(image_keys, text_keys, strict=True))
    assert (extra_positives > 0) == (top_k > 0)


@pytest.mark.parametrize("counts", [(3, 3, 3), (7, 2), (5, 16, 1), (1,) * 20])
def test_queue_takes_any_batch(counts: tuple[int, ...]) -> None:
    objective = build_objective(toy(), ObjectiveConfig("moco", queue=7))
    assert isinstance(objective, Moco)
    kept: deque[int] = deque(maxlen=7)
    number = 0
    for count in counts:
        numbers = torch.arange(number, number + count)
        number += count
        rows = numbers[:, None].float().expand(-1, 6)
        objective.push(rows, -rows, torch.stack([numbers, numbers], dim=1))
        kept.extend(numbers.tolist())
    filled = min(7, number)
    assert sorted(objective.image_queue[:filled, 0].tolist()) == sorted(kept)
    assert torch.equal(objective.image_queue, -objective.text_queue), "both queues hold the same pairs in a slot"
    assert objective.queue_ids[:filled, 1].tolist() == objective.image_queue[:filled, 0].tolist()
    assert set(objective.queue_ids[:, 0].tolist()) == {-1}


def test_near_both() -> None:
    by_image = torch.tensor([[0.9, 0.8, 0.1, 0.0]])
    by_text = torch.tensor([[0.1, 0.9, 0.8, 0.0]])
    assert near_both(by_image, by_text, 2).tolist() == [[False, True, False, False]]
    assert near_both(by_image, by_text, 9).all()
    assert not near_both(by_image, by_text, 0).any()


def test_evaluation_changes_nothing() -> None:
    objective = build_objective(toy(), ObjectiveConfig("moco", queue=7)).eval()
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    objective(*toy_batch(4, 0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())


def test_keys_get_no_gradient() -> None:
    objective = build_objective(toy(), ObjectiveConfig("moco", learn_temperature=False)).train()
    objective(*toy_batch(4, 0))["loss"].backward()
    trained = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {"towers.picture.0.weight", "towers.picture.0.bias", "towers.words.weight"}


@pytest.mark.parametrize("name", NAMES)
def test_learns(name: str) -> None:
    objective = build_objective(toy(), ObjectiveConfig(name, queue=16)).train()  # type: ignore[arg-type]
    pixels, tokens, _ = toy_batch(5, 0)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        objective(pixels, tokens, torch.arange(5))["loss"].backward()
        optimizer.step()
    images, texts = features(objective, pixels, tokens)
    assert (images @ texts.T).argmax(dim=1).tolist() == list(range(5))


def test_frozen_parts_keep_weights_and_statistics() -> None:
    towers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    class Convolved(ToyTowers):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = towers

        def encode_pixels(self, pixels: Tensor) -> Tensor:
            return super().encode_pixels(pixels + self.trunk(pixels).mean(dim=1, keepdim=True))

    objective = build_objective(Convolved(), ObjectiveConfig("moco"), ["trunk*"]).train()
    before = {name: tensor.clone() for name, tensor in towers.state_dict().items()}
    objective(*toy_batch(4, 0))["loss"].backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in towers.state_dict().items())
    assert not any(p.requires_grad for p in towers.parameters())
    assert objective.towers.get_parameter("words.weight").grad is not None


@pytest.mark.parametrize(
    ("frozen", "problem"),
    [(["picture", "nothing"], "no part 'nothing'; the top-level parts are picture, words"), (["*"], "leaves")],
)
def test_freeze_says_what_is_wrong(frozen: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        build_objective(toy(), ObjectiveConfig(), frozen)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"queue": 0}, {"momentum": 1.0}, {"top_k": -1}])
def test_bad_settings(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ObjectiveConfig(**settings)  # type: ignore[arg-type]


def test_temperature() -> None:
    start = toy()
    nn.init.constant_(start.logit_scale, math.log(50))
    assert float(build_objective(start, ObjectiveConfig()).towers.scale.detach()) == pytest.approx(50)
    assert float(build_objective(start, ObjectiveConfig(temperature=0.1)).towers.scale.detach()) == pytest.approx(10)
    assert not build_objective(start, ObjectiveConfig(learn_temperature=False)).towers.scale.requires_grad

    class Fixed(ToyTowers):
        scale = torch.tensor(20.0)

    fixed = Fixed()
    del fixed.logit_scale
    assert float(build_objective(fixed, ObjectiveConfig())(*toy_batch(4, 0))["temperature"]) == pytest.approx(0.05)
    with pytest.raises(ConfigError, match="leave objective.temperature out"):
        build_objective(fixed, ObjectiveConfig(temperature=0.1))


def test_pairs() -> None:
    ids, candidates = torch.tensor([[0, 5], [1, 6]]), torch.tensor([[0, 5], [1, 6], [-1, 5]])
    own = [[True, False, False], [False, True, False]]
    positive, counted = pairs(ids, candidates, ObjectiveConfig(same_concept="positive"))
    assert positive.tolist() == [[True, False, True], [False, True, False]]
    assert counted.all()
    positive, counted = pairs(ids, candidates, ObjectiveConfig(same_concept="left-out"))
    assert positive.tolist() == own
    assert counted.tolist() == [[True, True, False], [True, True, True]]


def run_steps(objective: Objective, wrapped: nn.Module, part: slice, views: int = 2) -> list[dict[str, Tensor]]:
    """Three SGD steps on `part` of each batch of six; losses and gradients."""
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    found = []
    for step in range(3):
        pixels, tokens, labels = toy_batch(6, 20 + step, views)
        tokens = tokens.unflatten(0, (views, 6))[:, part].flatten(0, 1)
        loss = wrapped(pixels[part], tokens, labels[part])["loss"]
        optimizer.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **gradients})
        optimizer.step()
    return found


def worker(rank: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for name in NAMES:
        objective = build_objective(toy(), ObjectiveConfig(name, queue=7, top_k=2)).train()  # type: ignore[arg-type]
        wrapped = DistributedDataParallel(objective, broadcast_buffers=False)
        results[name] = (run_steps(objective, wrapped, slice(3 * rank, 3 * rank + 3)), objective.state_dict())
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in NAMES:
        whole = build_objective(toy(), ObjectiveConfig(name, queue=7, top_k=2)).train()  # type: ignore[arg-type]
        for one, two, alone in zip(first[name][0], second[name][0], run_steps(whole, whole, slice(6)), strict=True):
            torch.testing.assert_close((one.pop("loss") + two.pop("loss")) / 2, alone.pop("loss"))
            for parameter, gradient in alone.items():
                torch.testing.assert_close(one[parameter], gradient, atol=1e-5, rtol=1e-4)
                assert torch.equal(one[parameter], two[parameter])
        for key, tensor in whole.state_dict().items():
            assert torch.equal(first[name][1][key], second[name][1][key]), f"{name}: {key} differs between processes"
            torch.testing.assert_close(first[name][1][key], tensor, atol=1e-5, rtol=1e-4)
