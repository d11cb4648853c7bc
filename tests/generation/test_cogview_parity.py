"""The published layouts give the original's numbers: tokenizer, transformer, loss, rows. Golden files: their README."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from data.images import CorruptImage
from data.text import TextTokenizer
from generation.cogview.rows import (
    PRESETS,
    cogview_config,
    cogview_loss,
    fill_template,
    parse_query,
    read_binary_rows,
    restarted_positions,
    text_image_row,
    two_image_row,
)
from generation.rows.vocabulary import COMMANDS, Vocabulary
from generation.transformer.cache import KVCache
from generation.transformer.config import TransformerConfig
from generation.transformer.model import MaxScaledLayerNorm, Transformer
from tests.helpers.cogview import GOLDEN, assert_close, load_generator
from vqvae.cogview import import_tokenizer, read_picture
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.storage.parts import load_part

PUBLISHED = Vocabulary(8192, 50000)
OUTLIER = 80  # the token whose embedding holds a 60: its own logit column is large


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return load_generator(tmp_path_factory.mktemp("cogview"), "ckpt")


@pytest.fixture(scope="module")
def outlier(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return load_generator(tmp_path_factory.mktemp("outlier"), "outlier/ckpt")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> VQVAE:
    folder = tmp_path_factory.mktemp("vqvae") / "part"
    import_tokenizer(GOLDEN / "vqvae" / "vqvae.pt", folder)
    return load_part(VQVAE, folder)


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "transformer" / "io.safetensors")


@torch.no_grad()
def logits_of(model: Transformer, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return model.logits(model(tokens, positions))


def incremental(model: Transformer, io: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of tokens 0..51, fed as 20, then one by one, then 20, through the cache."""
    cache = KVCache(model.config, torch.zeros(2, 52, dtype=torch.bool), dtype=torch.float32, device="cpu")
    logits, start = [], 0
    for size in (20, *([1] * 12), 20):
        piece = slice(start, start + size)
        with torch.no_grad():
            hidden = model(io["tokens"][:, piece], io["position_ids"][:, piece], cache)
        logits.append(model.logits(hidden).detach())
        start += size
    return torch.cat(logits, dim=1)


# the image tokenizer


def test_codes_are_identical_and_pictures_equal(tokenizer):
    golden = load_file(GOLDEN / "vqvae" / "io.safetensors")
    codes = tokenizer.encode(golden["image_01"])
    assert torch.equal(codes.flatten(1), golden["codes"])
    assert golden["decoded"].min() < 0, "the original does not clamp; ours does"
    assert_close(tokenizer.decode(codes), golden["decoded"].clamp(0, 1), 1e-5)
    with torch.no_grad():
        raw = tokenizer.decoder(tokenizer.quantizer.lookup(codes).permute(0, 3, 1, 2)) * tokenizer.std + tokenizer.mean
    assert_close(raw, golden["decoded"], 1e-5)


@pytest.mark.parametrize(("name", "file"), [("rgb", "pic_rgb_80x96.png"), ("rgba", "pic_rgba_80x60.png")])
def test_pictures_are_read_as_the_original_reads_them(tokenizer, name, file):
    golden = load_file(GOLDEN / "vqvae" / "read_img.safetensors")
    picture = read_picture(GOLDEN / "vqvae" / file, 64)[None]
    assert_close((picture - tokenizer.mean) / tokenizer.std, golden[f"{name}.read_img_64"], 1e-6)
    assert torch.equal(tokenizer.encode(picture).flatten(1), golden[f"{name}.codes"])


def test_what_is_no_picture_is_refused():
    with pytest.raises(CorruptImage):
        read_picture(GOLDEN / "vqvae" / "vqvae.pt", 64)


def test_the_published_tokenizer_is_reachable_by_config():
    with torch.device("meta"):
        model = VQVAE(VQVAEConfig.cogview())
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["encoder.down.2.weight"] == [512, 512, 4, 4]
    assert shapes["decoder.up.0.weight"] == [256, 512, 4, 4]
    assert shapes["quantizer.codebook"] == [8192, 256]
    assert not [name for name in shapes if "expand" in name or "blocks" in name]
    assert model.config.stride == 8


# the transformer


@pytest.mark.parametrize("preset", ["cogview-4b", "cogview-caption", "cogview-sr", "cogview-small"])
def test_presets_have_the_published_sizes(preset):
    assert preset in PRESETS
    config = cogview_config(preset)
    with torch.device("meta"):
        model = Transformer(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == (211_958_784 if preset == "cogview-small" else 3_928_849_920)
    assert config.num_positions == 1089
    assert model.embed.weight.shape[0] == 58240
    assert config.vocabulary.command("[PAD]") == 58192


def test_unknown_presets_and_too_few_positions_are_refused():
    with pytest.raises(ValueError, match="choose from cogview-4b"):
        cogview_config("cogview-9b")
    with pytest.raises(ValueError, match="1000 positions are too few"):
        cogview_config(positions=1000)


def test_logits(generator, io):
    assert_close(logits_of(generator, io["tokens"], io["position_ids"]), io["logits"], 5e-5)


def test_logits_of_a_half_precision_training_checkpoint(tmp_path, io):
    model = load_generator(tmp_path, "ckpt_fp16_full")
    assert_close(logits_of(model, io["tokens"], io["position_ids"])[:, ::8], io["logits_fp16_ckpt"], 5e-5)


def test_positions_of_finetuning(generator, io, caplog):
    vocab = generator.config.vocabulary
    positions = restarted_positions(vocab, io["tokens"])
    assert torch.equal(positions, io["position_ids_finetune"])
    assert torch.equal(restarted_positions(vocab, io["long_tokens"]), io["long_position_ids_finetune"])
    logits = logits_of(generator, io["tokens"], positions)
    assert_close(logits[:, ::8], io["logits_finetune_positions"], 5e-5)
    assert (1089 > io["long_tokens"].shape[1]) != ("those of 1089" in caplog.text), "a fallback is said"
    caplog.clear()
    assert restarted_positions(vocab, io["long_tokens"], 20).max() == 19
    assert not caplog.text
    with pytest.raises(ValueError, match="at least one entry, not 0"):
        restarted_positions(vocab, io["tokens"], 0)
    with pytest.raises(ValueError, match=r"needs an \[ROI2\]"):
        restarted_positions(vocab, torch.zeros(1, 4, dtype=torch.int64))


def test_the_cache_gives_the_logits_of_the_original_memory(generator, io):
    assert_close(incremental(generator, io), io["logits_incremental"], 1e-4)


def test_norms_scale_by_the_whole_tensor(outlier):
    """One large activation in row 0 changes row 1, as it does in the original and in no ordinary transformer."""
    golden = load_file(GOLDEN / "transformer" / "outlier" / "io.safetensors")
    logits = logits_of(outlier, golden["tokens"], golden["position_ids"])
    others = torch.arange(256) != OUTLIER
    assert_close(logits[:, ::2, others], golden["logits"][..., others], 2e-5)
    assert_close(logits[:, ::2], golden["logits"], 2e-4)
    alone = logits_of(outlier, golden["tokens"][1:], golden["position_ids"][1:])
    assert (alone - logits[1:])[..., others].abs().max() > 0.1


def test_a_cache_differs_where_activations_are_large(outlier):
    """As docs/cogview.md says: the original normalises its whole memory anew at every step, by its own maximum."""
    golden = load_file(GOLDEN / "transformer" / "outlier" / "io.safetensors")
    difference = (incremental(outlier, golden) - golden["logits_incremental"]).abs()
    difference[..., OUTLIER] = 0
    assert 0.05 < difference.max() < 0.3


def test_max_scaled_norm_in_closed_form():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3
    norm = MaxScaledLayerNorm(8).double()
    epsilon = norm.eps * (x.abs().max() / 8) ** 2
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + epsilon).sqrt()
    torch.testing.assert_close(norm(x), expected)
    assert torch.equal(norm(torch.zeros(1, 8, dtype=torch.float64)), torch.zeros(1, 8, dtype=torch.float64))
    config = TransformerConfig.cogview(width=64, heads=4, depth=1)
    assert type(Transformer(config).norm) is torch.nn.LayerNorm, "the default stays an ordinary LayerNorm"


# training


@pytest.mark.parametrize(("name", "scale"), [("scale1", 1.0), ("scale5", 5.0), ("scale5_finetune", 5.0)])
def test_loss_and_gradients(generator, name, scale):
    golden = load_file(GOLDEN / "training" / "loss.safetensors")
    vocab, tokens = generator.config.vocabulary, golden["text"]
    positions = restarted_positions(vocab, tokens[:, :-1]) if "finetune" in name else None
    generator.zero_grad()
    found = cogview_loss(generator, tokens, golden["loss_mask"], scale, positions)
    assert_close(found["loss"].detach().view(1), golden[f"{name}.loss"], 2e-5)
    assert_close(found["image_loss"].view(1), golden[f"{name}.img_loss"], 2e-5)
    assert_close(found["text_loss"].view(1), golden[f"{name}.txt_loss"], 2e-5)
    found["loss"].backward()
    gradients = {key: parameter.grad for key, parameter in generator.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert_close(norm.view(1), golden[f"{name}.grad_norm"], 2e-5)
    if name == "scale5":
        for ours, theirs in (
            ("embed.weight", "word_embeddings.weight"),
            ("norm.bias", "transformer.final_layernorm.bias"),
            ("blocks.0.attention.qkv.weight", "transformer.layers.0.attention.query_key_value.weight"),
            ("blocks.1.mlp.project.bias", "transformer.layers.1.mlp.dense_4h_to_h.bias"),
            ("blocks.1.attention_out_norm.weight", "transformer.layers.1.third_layernorm.weight"),
        ):
            assert_close(gradients[ours], golden[f"scale5.grad.{theirs}"], 2e-5)
    generator.zero_grad()


# rows and queries


def test_binary_rows(tmp_path):
    golden = load_file(GOLDEN / "text" / "templates.safetensors")
    tokens, mask = read_binary_rows(GOLDEN / "text" / "rows.bin", PUBLISHED)
    assert torch.equal(tokens, golden["text"])
    assert torch.equal(mask, golden["loss_mask"])
    (tmp_path / "short.bin").write_bytes((GOLDEN / "text" / "rows.bin").read_bytes()[:-4])
    with pytest.raises(ValueError, match="truncated"):
        read_binary_rows(tmp_path / "short.bin", PUBLISHED)


def test_template_rows():
    golden = {name: tensor.tolist() for name, tensor in load_file(GOLDEN / "text" / "templates.safetensors").items()}
    text, small, large = golden["in_text"], golden["in_c8"], golden["in_c16"]
    assert text_image_row(PUBLISHED, text, small) == golden["text_code_template_8x8"]
    assert two_image_row(PUBLISHED, text, small, large) == golden["code2code_template_8_16"]
    with pytest.raises(ValueError, match="5 codes are no square"):
        text_image_row(PUBLISHED, [], [1] * 5)


TEXTS = json.loads((GOLDEN / "text" / "tokenizer.json").read_text(encoding="utf-8"))


def unpacked(ids: list) -> list[int]:
    """[-1, n] stands for n times -1."""
    return [token for entry in ids for token in ([-1] * entry[1] if isinstance(entry, list) else [entry])]


def test_command_ids():
    assert {name: PUBLISHED.command(name) for name in COMMANDS} == TEXTS["commands"]
    assert PUBLISHED.padded_size == TEXTS["padded_to_128"]


@pytest.mark.parametrize("case", TEXTS["cases"], ids=lambda case: case["text"])
def test_queries(case):
    pieces = {case["text"].split("\t")[0]: [token - 8192 for token in case["queries"]["bare"]], "": []}
    for name, template in TEXTS["templates"].items():
        query = fill_template(template, case["text"])
        assert parse_query(query, PUBLISHED, pieces.__getitem__) == unpacked(case["queries"][name])


def test_pictures_in_queries():
    def read(path):
        assert path == "a.png"
        return [5, 6, 7]

    query = "[BASE] [BOI1] [Image]a.png [EOI1] [Image1]a.png"
    row = parse_query(query, PUBLISHED, lambda text: [], read)
    base, begin, end = (PUBLISHED.command(name) for name in ("[BASE]", "[BOI1]", "[EOI1]"))
    assert row == [base, begin, 5, 6, 7, end, 5, -1, -1]
    with pytest.raises(ValueError, match="may not name pictures"):
        parse_query(query, PUBLISHED, lambda text: [])
    with pytest.raises(ValueError, match="more slots"):
        fill_template("{} {}", "one")


@pytest.mark.skipif("MMWUDAO_COGVIEW_SPM" not in os.environ, reason="MMWUDAO_COGVIEW_SPM names no cog-pretrain.model")
@pytest.mark.parametrize("case", TEXTS["cases"], ids=lambda case: case["text"])
def test_text_ids_of_the_published_model(case):
    text = TextTokenizer(os.environ["MMWUDAO_COGVIEW_SPM"], needs_bytes=False)
    assert text.vocab_size == 50000
    assert PUBLISHED.text(text.encode(case["text"])) == case["ids"]
    assert text.decode(text.encode(case["text"])) in case["decoded"]
    for name, template in TEXTS["templates"].items():
        row = parse_query(fill_template(template, case["text"]), PUBLISHED, text.encode)
        assert row == unpacked(case["queries"][name])
