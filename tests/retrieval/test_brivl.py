"""BriVL 1.0 as published: features, boxes, texts, the training step and import, against the original's outputs.

The momentum towers of the golden set are too large to keep: where a step needs their keys, they come from the golden
queues.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retrieval.towers.base import load_towers
from retrieval.towers.brivl import BrivlConfig, BrivlTowers, pool_boxes, trainable_names
from retrieval.towers.importing import brivl_keys, import_brivl
from retrieval.training.brivl_moco import BrivlBatch, BrivlMoco, BrivlMocoConfig
from tests.helpers.brivl import GOLDEN, arrays, checkpoint, close, pictures, records, texts

STEPS = json.loads((GOLDEN / "train_steps.json").read_text())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "brivl.pth"
    torch.save(checkpoint(), path)
    return path


@pytest.fixture(scope="module")
def folder(published: Path) -> Path:
    out = published.parent / "towers"
    return import_brivl(published, out, text_model=GOLDEN / "hf_text", config=GOLDEN / "cfg.yml")


@pytest.fixture
def towers(folder: Path) -> BrivlTowers:
    loaded = load_towers(folder)
    assert isinstance(loaded, BrivlTowers)
    return loaded


def batch(towers: BrivlTowers, full: bool = False) -> BrivlBatch:
    boxes, mask = towers.place_boxes([record["bbox"] for record in records()], [image.size for image in pictures()])
    if full:
        boxes, mask = arrays("train_steps.npz")["full_boxes"], arrays("train_steps.npz")["full_mask"]
    tokens = towers.tokenize(texts())
    pixels = torch.stack([towers.preprocess(image) for image in pictures()])
    return BrivlBatch(pixels, boxes, mask, tokens["ids"], tokens["mask"])


def encode(towers: BrivlTowers, data: BrivlBatch) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return (
            towers.encode_pixels(data.pixels, data.boxes, data.box_mask),
            towers.encode_tokens({"ids": data.ids, "mask": data.text_mask}),
        )


# features


def test_features_of_pictures_boxes_and_texts(towers):
    expected, given, data = arrays("expected_extract.npz"), arrays("inputs.npz"), batch(towers)
    assert torch.equal(data.boxes, given["boxes"])
    assert torch.equal(data.box_mask, given["img_mask"])
    assert torch.equal(data.ids, given["text_ids"])
    assert torch.equal(data.text_mask, given["text_mask"])
    images, words = encode(towers, data)
    close(images, expected["img_feat"])
    close(words, expected["text_feat"])
    close(towers.encode_text(texts()), expected["text_feat"])


def test_intermediates(towers):
    expected, data = arrays("expected_extract.npz"), batch(towers)
    with torch.no_grad():
        pooled = pool_boxes(towers.image.backbone.forward_features(data.pixels), data.boxes, 150, 4)
        close(towers.image.project(pooled[..., None]).squeeze(-1).transpose(1, 2), expected["img_roi_pooled"])
        words = towers.text.backbone(data.ids, attention_mask=torch.ones_like(data.ids)).last_hidden_state
    close(words, expected["text_bert_out"])


def test_without_boxes_a_picture_is_its_own_box(towers):
    """The third record has none."""
    assert [len(record["bbox"]) for record in records()] == [9, 3, 0, 6]
    close(towers.encode_image([pictures()[2]]), arrays("expected_extract.npz")["img_feat"][2:3])
    apart = towers.encode_image(pictures()) - arrays("expected_extract.npz")["img_feat"]
    assert apart[0].abs().max() > 0.01, "boxes must count where they are given"


def test_the_order_of_boxes_does_not_matter(towers):
    data, order = batch(towers), torch.randperm(7, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        turned = towers.encode_pixels(data.pixels, data.boxes[:, order], data.box_mask[:, order])
    close(turned, arrays("expected_extract.npz")["img_feat"])


def test_boxes_are_sampled_as_in_the_original():
    """Each sample computed alone: the mixed grid, then bilinear weights with zeros outside."""
    torch.manual_seed(0)
    features, box, size, grid = torch.randn(1, 2, 5, 6), torch.tensor([30.0, 12.0, 140.0, 150.0]), 150, 3
    x1, y1, x2, y2 = (box * 5 / size).tolist()
    total = torch.zeros(2)
    for row in range(grid):
        for column in range(grid):
            u, v = (2 * column + 1) / grid - 1, (2 * row + 1) / grid - 1
            x = ((x2 - x1) / 5 * u + (x1 + x2 - 5) / 5 + 1) * 6 / 2 - 0.5
            y = ((y2 - y1) / 4 * v + (y1 + y2 - 4) / 4 + 1) * 5 / 2 - 0.5
            for j in (int(np.floor(x)), int(np.floor(x)) + 1):
                for i in (int(np.floor(y)), int(np.floor(y)) + 1):
                    if 0 <= j < 6 and 0 <= i < 5:
                        total += features[0, :, i, j] * (1 - abs(x - j)) * (1 - abs(y - i))
    torch.testing.assert_close(pool_boxes(features, box.view(1, 1, 4), size, grid)[0, :, 0], total / grid**2)


def test_wrong_boxes(towers):
    with pytest.raises(ValueError, match="a box is x1, y1, x2, y2, not"):
        towers.place_boxes([[[1, 2, 3]]], [(10, 10)])
    boxes, mask = towers.place_boxes([[[0, 0, 5, 5]] * 50], [(10, 10)])
    assert mask.sum() == towers.config.box_slots
    assert boxes[0, -1].tolist() == [0, 0, 150, 150]


def test_a_long_text_is_cut_with_a_warning(towers, caplog):
    with caplog.at_level(logging.WARNING):
        tokens = towers.tokenize(["海" * 100_000, "海\ud800", ""])
    assert "1 of 3 texts are longer than 24 tokens and were cut" in caplog.text
    assert tokens["mask"].sum(1).tolist() == [24, 3, 2]  # U+FFFD is no piece
    assert torch.isfinite(towers.encode_text([""])).all()


# training


class GoldenKeys(BrivlMoco):
    """The training step with the momentum towers' keys read from golden queues."""

    given: Iterator[tuple[Tensor, Tensor]]

    def encode_keys(self, batch: BrivlBatch, image_order: Tensor, text_order: Tensor) -> tuple[Tensor, Tensor]:
        return next(self.given)


def step(towers: BrivlTowers, scenario: str, top_k: int = 0) -> GoldenKeys:
    golden = arrays("train_steps.npz")
    moco = GoldenKeys(towers, BrivlMocoConfig(queue=24, top_k=top_k))
    moco.image_queue.copy_(golden["img_queue0"])
    moco.text_queue.copy_(golden["text_queue0"])
    moco.pointer.fill_(20)
    names = ("img_queue", "text_queue") if scenario.startswith("F") else ("img_queue1", "text_queue1")
    images, words = (golden[f"{scenario}/{name}"].T for name in names)
    moco.given = iter([(images[at : at + 4].clone(), words[at : at + 4].clone()) for at in (20, 0, 4)])
    moco.eval()
    if scenario[0] in "EF":  # the batch's own statistics, nothing dropped out
        moco.train()
        for module in moco.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
    return moco


def check_norms(found: dict[str, Tensor | None], golden: dict[str, float | None], keys: dict[str, str]) -> None:
    compared = 0
    for name, tensor in found.items():
        norm = golden[keys[name]]
        assert (tensor is None) == (norm is None), name
        if tensor is not None and norm is not None and norm > 1e-4:
            assert tensor.double().norm().item() == pytest.approx(norm, rel=1e-3), name
            compared += 1
    assert compared > 50


@pytest.mark.parametrize("scenario", [name for name in STEPS if not name.startswith("F")])
def test_one_training_step(towers, scenario):
    golden, expected = arrays("train_steps.npz"), STEPS[scenario]
    moco = step(towers, scenario, top_k=3 if scenario.startswith("D") else 0)
    loss = moco(batch(towers, full=scenario.startswith("C")))
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-4)
    close(moco.image_queue, golden[f"{scenario}/img_queue1"])
    close(moco.text_queue, golden[f"{scenario}/text_queue1"])
    assert int(moco.pointer) == expected["img_ptr_after"] == 0
    loss.backward()
    keys = brivl_keys(towers)
    if "grads" in expected:
        check_norms({name: p.grad for name, p in towers.named_parameters()}, expected["grads"], keys)
    if "requires_grad" in expected:
        assert {keys[name] for name in trainable_names(towers)} == set(expected["requires_grad"])
    if "state" in expected:  # the batch statistics have moved
        floats = {name: tensor for name, tensor in towers.state_dict().items() if tensor.is_floating_point()}
        check_norms(floats, expected["state"], keys)


def test_more_positives_change_the_loss(towers):
    golden = arrays("train_steps.npz")
    moco = step(towers, "D_eval_multilabel", top_k=3)
    extra = moco.extra_positives(*next(moco.given))
    assert torch.equal(extra, golden["D_eval_multilabel/pos_mask"][:, 1:])
    assert extra.any()
    assert STEPS["D_eval_multilabel"]["loss"] > STEPS["A_eval_identity"]["loss"] + 1


def test_three_training_steps(towers):
    golden, expected = arrays("train_steps.npz"), STEPS["F_sgd3"]
    moco, data = step(towers, "F_sgd3"), batch(towers)
    optimizer = torch.optim.SGD([p for p in towers.parameters() if p.requires_grad], lr=expected["lr"])
    losses = []
    for _ in range(3):
        loss = moco(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(expected["losses"], abs=1e-4)
    assert int(moco.pointer) == expected["ptr_after"] == 8
    close(moco.image_queue, golden["F_sgd3/img_queue"])
    images, words = encode(towers.eval(), data)
    close(images, golden["F_sgd3/img_feat"])
    close(words, golden["F_sgd3/text_feat"])


def test_momentum_towers_follow_and_masks_stay_behind(towers):
    torch.manual_seed(0)
    moco, data = BrivlMoco(towers, BrivlMocoConfig(queue=8, momentum=0.9)).eval(), batch(towers)
    assert moco.image_queue.norm(dim=0).allclose(torch.ones(8))
    before = {}
    for name, key in moco.keys.named_parameters():
        before[name] = key.add_(torch.randn_like(key) * 0.01).clone()
    order, words_order = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 3, 0])
    images, words = moco.encode_keys(data, order, words_order)
    for name, key in moco.keys.named_parameters():
        expected = before[name].double() * 0.9 + towers.get_parameter(name).double() * 0.1
        torch.testing.assert_close(key.double(), expected, atol=1e-6, rtol=1e-6)
        assert not key.requires_grad
    _, plain = encode(moco.keys, data)
    close(words, plain)
    for place, picture in enumerate(order.tolist()):
        with torch.no_grad():
            alone = moco.keys.encode_pixels(data.pixels[[picture]], data.boxes[[picture]], data.box_mask[[place]])
        close(images[[picture]], alone)
    assert not torch.allclose(images, encode(moco.keys, data)[0], atol=1e-3)


def test_a_step_with_its_own_keys_and_random_orders(towers):
    torch.manual_seed(0)
    moco, data = BrivlMoco(towers, BrivlMocoConfig(queue=8)).eval(), batch(towers, full=True)
    images, words = encode(towers, data)  # the momentum towers start equal
    queues = moco.image_queue.clone(), moco.text_queue.clone()
    loss = moco(data)
    expected = 0.0
    for queries, keys, queue in ((words, images, queues[0]), (images, words, queues[1])):
        logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue], 1) / 0.07
        expected += nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.int64)).item()
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    close(moco.image_queue[:, :4].T, images)
    moco(data)
    assert int(moco.pointer) == 0
    with pytest.raises(ValueError, match="not a multiple of the batch of 4"):
        BrivlMoco(towers, BrivlMocoConfig(queue=6))(data)


# the published size


@pytest.mark.slow
def test_the_published_size():
    """Weights and inputs made from names and seeds; needs 2.5 GB."""
    spec = importlib.util.spec_from_file_location("recipe", GOLDEN / "fullsize" / "recipe.py")
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    with torch.device("meta"):
        towers = BrivlTowers(BrivlConfig(), (GOLDEN / "hf_text" / "vocab.txt").read_bytes())
    keys = brivl_keys(towers)
    shapes = copy.copy(towers.state_dict())
    towers = towers.to_empty(device="cpu").eval()
    towers.load_state_dict(
        {name: torch.from_numpy(recipe.fill(keys[name], tuple(tensor.shape))) for name, tensor in shapes.items()}
    )
    # buffers that are not stored
    embeddings: Any = towers.text.backbone.embeddings
    embeddings.position_ids = torch.arange(512)[None]
    embeddings.token_type_ids = torch.zeros(1, 512, dtype=torch.int64)
    given = {name: torch.from_numpy(value) for name, value in recipe.inputs().items()}
    expected = arrays("fullsize/expected.npz")
    with torch.no_grad():
        close(towers.encode_pixels(given["images"], given["boxes"], given["img_mask"]), expected["img_feat"])
        close(towers.encode_tokens({"ids": given["text_ids"], "mask": given["text_mask"]}), expected["text_feat"])
