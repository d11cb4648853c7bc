"""Text encoders: parity with transformers, 4-bit storage, E5's file, pruning, refusals of one line."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

from data.config import ConfigError
from mmwudao.cli.app import run
from retrieval.encoders.bert import MODEL_TYPES, attend_short, bert_of
from retrieval.encoders.e5_file import e5_text_encoder, read_e5_file
from retrieval.encoders.importing import import_text_encoder
from retrieval.encoders.pruning import prune_text_encoder
from retrieval.encoders.settings import TextImport
from retrieval.encoders.text_encoder import load_text_encoder, save_text_encoder
from tests.conftest import CAPTIONS
from tests.helpers.cli import one_error
from tests.helpers.tiny_encoders import BERT, e5_file, tiny_text_encoder, unigram_pieces
from vqvae.storage.blocks import pack_eight_bit, pack_four_bit, unpack_eight_bit, unpack_four_bit
from vqvae.storage.parts import ModelError


def test_four_bits_give_back_what_they_can_hold():
    scale = torch.rand(6, 1).half().float() + 0.1
    halves = torch.randint(-8, 8, (6, 32))
    halves[:, 5] = -8  # the largest magnitude of a block is -8 times its scale
    exact = halves * scale.half().float()
    assert torch.equal(unpack_four_bit(pack_four_bit(exact), (6, 32)), exact)
    weights = torch.randn(64, 96)
    error = (unpack_four_bit(pack_four_bit(weights), (64, 96)) - weights).abs()
    assert float((error / weights.abs().max()).max()) < 1 / 7
    assert pack_four_bit(weights).numel() == weights.numel() / 32 * 18


def test_eight_bits_give_back_what_they_can_hold():
    exact = torch.randint(-127, 128, (6, 32), generator=torch.Generator().manual_seed(0)).float() * 0.5
    exact[:, 0] = 63.5  # the largest: the scale is one half
    assert torch.equal(unpack_eight_bit(pack_eight_bit(exact), (6, 32)), exact)
    weights = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    error = (unpack_eight_bit(pack_eight_bit(weights), (64, 96)) - weights).abs()
    assert error.max() < 0.51 * weights.abs().max() / 127
    assert torch.equal(unpack_eight_bit(pack_eight_bit(torch.zeros(32)), (32,)), torch.zeros(32))
    with pytest.raises(ValueError, match="do not fill blocks"):
        pack_eight_bit(torch.randn(5, 7))
    with pytest.raises(ValueError, match="do not hold"):
        unpack_eight_bit(torch.zeros(2, 18, dtype=torch.uint8), (2, 32))


def test_four_bits_refuse_other_sizes():
    with pytest.raises(ValueError, match="do not fill blocks"):
        pack_four_bit(torch.randn(5, 7))
    with pytest.raises(ValueError, match="do not hold"):
        unpack_four_bit(torch.zeros(2, 18, dtype=torch.uint8), (3, 32))


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_vectors_are_those_of_transformers(tmp_path, model_type, pooling):
    torch.manual_seed(1)
    tiny = tiny_text_encoder()
    sizes = {**BERT, "model_type": model_type, "vocab_size": 404, "pad_token_id": 1}
    config = AutoConfig.for_model(**sizes)
    original = AutoModel.from_config(config).eval()
    original.save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "tokenizer.json").write_bytes(tiny.serialised)
    settings = TextImport(pooling=pooling, prefix="passage: ", max_tokens=40, bits=32)
    encoder = load_text_encoder(import_text_encoder(tmp_path / "hub", tmp_path / "part", settings))
    texts = CAPTIONS[:9]
    ids = encoder.tokenize(texts)
    expected = encoder.tokenizer.encode("passage: " + texts[0]).ids
    assert ids[0, : len(expected)].tolist() == expected
    with torch.no_grad():
        for row, text in zip(encoder(ids), texts, strict=True):
            one = torch.tensor([encoder.tokenizer.encode("passage: " + text).ids])
            hidden = original(input_ids=one).last_hidden_state[0]
            torch.testing.assert_close(row, hidden[0] if pooling == "first" else hidden.mean(0), atol=1e-5, rtol=1e-5)
    lengths = encoder.encode(texts, batch_size=4).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(9))


@pytest.mark.parametrize(("attention", "training"), [("sdpa", False), ("eager", True)])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_network_is_that_of_transformers_to_the_bit(model_type, attention, training):
    """In training too, where short rows are attended otherwise, once nothing is dropped out."""
    torch.manual_seed(2)
    sizes = {**BERT, "model_type": model_type, "vocab_size": 50, "pad_token_id": 1}
    original = AutoModel.from_config(
        AutoConfig.for_model(**sizes), add_pooling_layer=False, attn_implementation=attention
    ).train()
    own = bert_of(sizes).train()
    assert float(own.embeddings.word_embeddings.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    own.load_state_dict(original.state_dict())
    for module in [*own.modules(), *original.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.randint(2, 50, (4, 11))
    ids[1, 7:] = ids[2, 3:] = 1
    with torch.set_grad_enabled(training):
        for some in (ids, ids[:1]):  # with padding and without
            expected = original(input_ids=some, attention_mask=(some != 1).long()).last_hidden_state
            found = own(some, some != 1)
            assert torch.equal(found, expected)
            if training:
                found.square().sum().backward()
                expected.square().sum().backward()
    for name, parameter in original.named_parameters():
        torch.testing.assert_close(own.get_parameter(name).grad, parameter.grad, msg=name)


def test_settings_that_the_network_lacks_are_named():
    for changes, problem in (
        ({"hidden_act": "swish"}, "hidden_act is one of gelu"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is absolute"),
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads=5"),
        ({"pad_token_id": 404}, "pad_token_id=404 is none of 50 pieces"),
        ({"model_type": "gpt2"}, "model_type is one of"),
        ({"is_decoder": True}, "is_decoder: no setting of a text encoder"),
    ):
        with pytest.raises(ValueError, match=problem):
            bert_of({**BERT, "vocab_size": 50, **changes})


def test_e5_file_is_read_as_it_was_written(tmp_path):
    pieces = unigram_pieces()
    encoder = tiny_text_encoder()
    path = tmp_path / "e5.bin"
    path.write_bytes(e5_file(encoder, pieces))
    read = e5_text_encoder(path, max_tokens=40)
    assert read.config.prefix == "query: "
    assert read.config.pooling == "mean"
    for name, tensor in encoder.transformer.state_dict().items():
        expected = unpack_four_bit(pack_four_bit(tensor), tuple(tensor.shape)) if tensor.ndim == 2 else tensor
        torch.testing.assert_close(read.transformer.state_dict()[name], expected)
    assert torch.equal(read.tokenize(CAPTIONS[:5]), encoder.tokenize(CAPTIONS[:5]))


def test_damaged_e5_files_are_refused_in_one_line(tmp_path):
    whole = e5_file(tiny_text_encoder(), unigram_pieces())
    path = tmp_path / "e5.bin"
    hostile = {
        "nothing": b"",
        "foreign": b"GGUF" + whole[4:],
        "short": whole[: len(whole) // 2],
        "no tail": whole[:-10],
        "huge width": whole[:8] + (2**30).to_bytes(4, "little") + whole[12:],
        "no layers": whole[:12] + bytes(4) + whole[16:],
        "other blocks": whole[:40] + (64).to_bytes(4, "little") + whole[44:],
        "one layer less": whole[:12] + (2).to_bytes(4, "little") + whole[16:],
    }
    for name, content in hostile.items():
        path.write_bytes(content)
        with pytest.raises(ModelError) as refused:
            read_e5_file(path)
        assert "\n" not in str(refused.value), name


def test_four_bit_folder_loads_as_rounded(tmp_path):
    encoder = tiny_text_encoder()
    encoder.config.bits = 4
    loaded = load_text_encoder(save_text_encoder(encoder, tmp_path / "part"))
    word = encoder.transformer.embeddings.word_embeddings.weight
    expected = unpack_four_bit(pack_four_bit(word), tuple(word.shape))
    assert torch.equal(loaded.transformer.embeddings.word_embeddings.weight, expected)
    assert loaded.config == encoder.config


def test_pruned_encoder_of_all_layers_says_the_same():
    encoder = tiny_text_encoder()
    used = sorted({index for text in CAPTIONS for index in encoder.tokenizer.encode(encoder.config.prefix + text).ids})
    texts = [encoder.config.prefix + text for text in CAPTIONS]
    pruned = prune_text_encoder(encoder, len(used) + 2, [0, 1, 2], texts * 3, max_tokens=40)
    assert len(pruned.transformer.embeddings.word_embeddings.weight) == len(used) + 2 < 404
    torch.testing.assert_close(pruned.encode(CAPTIONS), encoder.encode(CAPTIONS), atol=1e-5, rtol=1e-4)
    shallow = prune_text_encoder(encoder, 200, [0, 2], texts, max_tokens=20)
    assert len(shallow.transformer.encoder.layer) == 2
    last = "output.dense.weight"
    assert torch.equal(
        shallow.transformer.encoder.layer[1].state_dict()[last], encoder.transformer.encoder.layer[2].state_dict()[last]
    )
    with pytest.raises(ConfigError, match="0 to 2"):
        prune_text_encoder(encoder, 200, [3], texts)


def test_bad_folders_are_one_line(tmp_path, capsys):
    tiny = tiny_text_encoder()
    folder = tmp_path / "hub"
    folder.mkdir()
    record = {**tiny.config.architecture, "pad_token_id": 1}

    def refused(message):
        assert run(["import", "text-encoder", str(folder), "-o", str(tmp_path / "part"), "--max-tokens", "40"]) == 2
        assert message in one_error(capsys)
        assert not (tmp_path / "part").exists()

    refused("config.json")
    (folder / "config.json").write_text(json.dumps({**record, "model_type": "gpt2"}))
    refused("'gpt2'")
    (folder / "config.json").write_text(json.dumps({**record, "num_hidden_layers": 10**9}))
    refused("num_hidden_layers")
    (folder / "config.json").write_text(json.dumps(record))
    refused("no tokenizer")
    (folder / "tokenizer.json").write_text("{}")
    refused("tokenizer")
    (folder / "tokenizer.json").write_bytes(tiny.serialised)
    refused("no weights")
    tensors = {name: tensor.clone() for name, tensor in tiny.transformer.state_dict().items()}
    (folder / "config.json").write_text(json.dumps({**record, "vocab_size": 100}))
    save_file(tensors, folder / "model.safetensors")
    refused("pieces")
    (folder / "config.json").write_text(json.dumps(record))
    tensors["embeddings.LayerNorm.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    refused("NaN")
    assert run(["import", "text-encoder", str(folder), "-o", str(tmp_path / "part"), "--pooling", "max"]) == 2
    assert "'max'" in one_error(capsys)
    assert run(["import", "text-encoder", str(tmp_path / "nosuch"), "-o", str(tmp_path / "part")]) == 2
    assert "there is no" in one_error(capsys)


def test_attention_of_short_rows_is_that_of_pytorch():
    query, key, value = (torch.randn(3, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    attended = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])
    attended = attended[:, None, None, :].expand(3, 1, 5, 5)
    for mask in (None, attended):
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        torch.testing.assert_close(attend_short(query, key, value, mask, 0.0), expected)
