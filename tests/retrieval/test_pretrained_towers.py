"""Towers on encoders that were trained elsewhere: storing, classes, training from parts, resuming."""

import json

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from data.config import ConfigError
from retrieval.encoders.text_encoder import load_text_encoder, save_text_encoder
from retrieval.towers.base import load_towers, save_towers, unit
from retrieval.towers.pretrained import PACKED_PARTS, VECTORS, HeadsConfig, PretrainedTowers
from retrieval.training.inherit import InitConfig, KeepConfig, TextVectors, mixed_trunk
from retrieval.training.pairs import AugmentConfig, PairsConfig, RetrievalCaptionConfig
from retrieval.training.student import TextHeadFit
from retrieval.training.train_towers import RetrievalTrainConfig, train
from retrieval.vectors.onnx_export import export_onnx
from tests.conftest import CAPTIONS
from tests.helpers.squares import write_squares
from tests.helpers.tiny_encoders import tiny_text_encoder, tiny_trunk
from vqvae.storage.blocks import (
    bits_of,
    pack_eight_bit,
    pack_four_bit,
    stored_numbers,
    unpack_eight_bit,
    unpack_four_bit,
)
from vqvae.storage.parts import stored_hash
from vqvae.training.config import LoopConfig
from vqvae.trunk import load_trunk, save_trunk

HEADS = HeadsConfig(embed_dim=16, image_size=32, hidden=32)


def towers_of(seed=0):
    torch.manual_seed(seed)
    return PretrainedTowers.from_parts(tiny_text_encoder(), tiny_trunk(), HEADS).eval()


def test_vectors_have_unit_length_and_precomputed_texts_agree():
    towers = towers_of()
    pictures = towers.encode_image(torch.rand(3, 3, 32, 32))
    texts = towers.encode_text(CAPTIONS[:5])
    torch.testing.assert_close(pictures.norm(dim=1), torch.ones(3))
    vectors = towers.text_encoder.encode(CAPTIONS[:5])
    torch.testing.assert_close(towers.encode_tokens({VECTORS: vectors}), texts, atol=1e-5, rtol=1e-4)


def test_a_sure_class_draws_the_picture_to_its_name():
    towers = towers_of()
    names = towers.text_encoder.encode(CAPTIONS[:7])
    towers.name_classes(names)
    expected = towers.encode_tokens({VECTORS: names})
    torch.testing.assert_close(towers.class_vectors, expected)
    pooled, sure = torch.rand(7, towers.trunk.channels), torch.eye(7) * 100
    alone = unit(towers.image_head(pooled))
    torch.testing.assert_close(towers.combine(pooled, sure), unit(alone + expected))
    mean = towers.combine(pooled, torch.zeros(7, 7))  # unsure of all: the mean of all names, which is short
    torch.testing.assert_close(mean, unit(alone + expected.mean(dim=0)))


def test_a_folder_of_four_bits_gives_back_rounded_numbers(tmp_path):
    towers = towers_of()
    towers.config.text.bits = 4
    loaded = load_towers(save_towers(towers, tmp_path / "towers"))
    for name, tensor in towers.state_dict().items():
        expected = tensor
        half, shape = tensor.bfloat16().float(), tuple(tensor.shape)
        large = tensor.ndim > 1 and tensor.numel() >= 4096 and tensor.numel() % 32 == 0
        if large and name.startswith(PACKED_PARTS):
            expected = unpack_four_bit(pack_four_bit(half), shape)
        elif large:
            expected = unpack_eight_bit(pack_eight_bit(half), shape)
        elif tensor.is_floating_point():
            expected = tensor.bfloat16().float()
        assert torch.equal(loaded.state_dict()[name], expected), name
    assert loaded.to_config() == towers.to_config()


def test_text_vectors_are_kept_and_computed_again_for_other_texts(tmp_path, monkeypatch):
    encoder = tiny_text_encoder()
    file = tmp_path / "texts.safetensors"
    first = TextVectors.prepare(encoder, CAPTIONS[:6], file)
    with monkeypatch.context() as patched:
        patched.setattr(encoder, "encode", lambda texts: pytest.fail("computed twice"))
        again = TextVectors.prepare(encoder, CAPTIONS[:6], file)
    assert torch.equal(first(CAPTIONS[2:4]), again(CAPTIONS[2:4]))
    other = TextVectors.prepare(encoder, CAPTIONS[:7], file)
    torch.testing.assert_close(other([CAPTIONS[6]])[0], encoder.encode([CAPTIONS[6]])[0], atol=1e-3, rtol=1e-2)


def test_a_student_takes_the_place_of_its_teacher():
    towers, student = towers_of(), tiny_text_encoder(seed=1)
    exchanged = towers.with_text_encoder(student)
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(exchanged.encode_image(pixels), towers.encode_image(pixels))
    vectors = student.encode(CAPTIONS[:4])
    torch.testing.assert_close(
        exchanged.encode_text(CAPTIONS[:4]), towers.encode_tokens({VECTORS: vectors}), atol=1e-5, rtol=1e-4
    )


def test_the_text_head_is_fitted_to_a_student(tmp_path):
    towers, student = towers_of(), tiny_text_encoder(seed=1)
    texts = [f"{first} {second}" for first in CAPTIONS[:8] for second in CAPTIONS[:8]]
    fit = TextHeadFit(student, TextVectors.prepare(towers.text_encoder, texts, tmp_path / "a"), tmp_path / "b")
    wanted = towers.encode_text(texts)
    near = [(fit(towers, steps).encode_text(texts) * wanted).sum(dim=1).mean() for steps in (0, 300)]
    assert near[1] > 0.9
    assert near[1] > near[0] + 0.05
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(fit(towers, 5).encode_image(pixels), towers.encode_image(pixels))


def test_padding_is_neither_counted_nor_read():
    towers = towers_of()
    texts = [CAPTIONS[0], " ".join(CAPTIONS[:4]), ""]
    tokens = towers.tokenize(texts)
    encoder = towers.text_encoder
    assert tokens[2, -1] == encoder.config.pad_token == 1
    lengths = [len(encoder.tokenizer.encode(encoder.config.prefix + text).ids) for text in texts]
    assert towers.count_tokens(tokens) == lengths
    assert min(lengths) < max(lengths)
    together = towers.encode_text(texts)
    for text, vector in zip(texts, together, strict=True):
        torch.testing.assert_close(towers.encode_text([text])[0], vector, atol=1e-5, rtol=1e-4)


def test_recomputed_activations_give_the_same_gradients():
    towers = towers_of().train()

    def gradients():
        torch.manual_seed(5)  # of dropout
        towers.zero_grad()
        pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        loss = (towers.encode_pixels(pixels) @ towers.encode_tokens(towers.tokenize(CAPTIONS[:4])).T).square().sum()
        loss.backward()
        return {name: tensor.grad for name, tensor in towers.named_parameters() if tensor.grad is not None}

    kept = gradients()
    towers.checkpoint_gradients()
    assert towers.trunk.model.grad_checkpointing
    recomputed = gradients()
    assert kept.keys() == recomputed.keys()
    assert any(name.startswith("text_encoder.") for name in kept)
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_onnxruntime_gives_the_same_vectors(tmp_path):
    towers = towers_of()
    files = export_onnx(towers, tmp_path / "onnx")
    assert [entry.file for entry in files] == ["image.onnx", "text.onnx"]
    assert (tmp_path / "onnx" / "tokenizer.json").read_bytes() == towers.text_encoder.serialised
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "text.onnx")
    for texts in (CAPTIONS[:1], CAPTIONS[3:8]):  # other lengths and batches than the export saw
        found = session.run(["features"], {"tokens": towers.tokenize(texts).numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), towers.encode_text(texts), atol=1e-4, rtol=0)


def test_numbers_in_blocks_are_all_counted(tmp_path):
    towers = towers_of()
    towers.config.text.bits = 4
    stored = load_file(save_towers(towers, tmp_path / "towers") / "model.safetensors")
    assert {bits_of(name) for name in stored} == {None, 4, 8}
    expected = sum(tensor.numel() for tensor in towers.state_dict().values())
    assert sum(stored_numbers(name, tensor) for name, tensor in stored.items()) == expected


def test_a_mixed_trunk_lies_between_and_comes_back():
    tuned, untouched = tiny_trunk(seed=1), tiny_trunk(seed=2).state_dict()
    own = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    with mixed_trunk(tuned, untouched, 0.25):
        for name, tensor in tuned.state_dict().items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor, 0.25 * own[name] + 0.75 * untouched[name], msg=name)
    for name, tensor in tuned.state_dict().items():
        assert torch.equal(tensor, own[name]), name


def test_init_needs_both_parts():
    with pytest.raises(ConfigError, match="both"):
        InitConfig(text="part")
    with pytest.raises(ConfigError, match="student"):
        InitConfig(student="part")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Shards of coloured squares, a text encoder and a trunk."""
    folder = tmp_path_factory.mktemp("pretrained")
    write_squares(folder / "shards")
    save_text_encoder(tiny_text_encoder(), folder / "text")
    save_trunk(tiny_trunk(), folder / "trunk")
    return folder


def config_of(workspace, out, **loop):
    return RetrievalTrainConfig(
        data=PairsConfig(shards=str(workspace / "shards"), test=["test"]),
        captions=RetrievalCaptionConfig(per_picture=2, keywords=0.2),
        augment=AugmentConfig(rotation=0.0, brightness=0.0, contrast=0.0),
        init=InitConfig(str(workspace / "text"), str(workspace / "trunk")),
        heads=HeadsConfig(embed_dim=16, image_size=32, hidden=32, dropout=0.0, warm_steps=20),
        keep=KeepConfig(negatives=8),
        freeze=["trunk.model.conv_stem"],
        rates={"trunk": 0.3},
        loop=LoopConfig(
            out=str(out), batch_size=8, learning_rate=3e-3, precision="float32", device="cpu",
            **{"warmup": 2, "steps": 12, "ema": 0.9, "log_every": 4, "eval_every": 100, "save_every": 6, **loop},
        ),
    )  # fmt: skip


def test_training_learns_and_leaves_frozen_parts_alone(workspace, tmp_path):
    folder = train(config_of(workspace, tmp_path / "run", steps=40))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["train/contrast"] for line in log if "train/contrast" in line]
    assert losses[-1] < losses[0]
    trained = load_towers(folder)
    start = PretrainedTowers.from_parts(load_text_encoder(workspace / "text"), load_trunk(workspace / "trunk"), HEADS)
    state, before = trained.state_dict(), start.state_dict()
    for name, tensor in before.items():
        if name.startswith(("text_encoder.", "trunk.model.conv_stem.")) or "running_" in name:
            torch.testing.assert_close(state[name], tensor.bfloat16().float(), msg=name)
    moved = [name for name in before if name.startswith("trunk.model.blocks") and name.endswith("conv_dw.weight")]
    assert any(not torch.equal(state[name], before[name].bfloat16().float()) for name in moved)


def test_the_share_of_the_tuned_trunk_is_saved(workspace, tmp_path):
    config = config_of(workspace, tmp_path / "run", steps=3)
    config.keep.wise = 0.0
    config.augment.mirror = 0.5
    towers = load_towers(train(config))
    assert isinstance(towers, PretrainedTowers)
    saved = towers.trunk.state_dict()
    for name, tensor in load_trunk(workspace / "trunk").state_dict().items():
        assert torch.equal(saved[name], tensor.bfloat16().float() if tensor.is_floating_point() else tensor), name


def test_a_resumed_run_ends_where_a_whole_one_does(workspace, tmp_path):
    train(config_of(workspace, tmp_path / "parts", steps=6, final_ratio=1.0, warmup=0))
    resumed = config_of(workspace, tmp_path / "parts", final_ratio=1.0, warmup=0)
    again = train(config_of(workspace, tmp_path / "one", final_ratio=1.0, warmup=0))
    assert stored_hash(train(resumed, resume=True)) == stored_hash(again)
