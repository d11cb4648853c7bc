"""Folders of towers as Hugging Face's hub has them: tiny, with random weights, written by transformers itself."""

from __future__ import annotations

import io
import json
import string
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

KINDS = ("clip", "siglip", "siglip2", "siglip2-fixed", "altclip", "chinese_clip", "metaclip_2")
LETTERS = string.ascii_letters + string.digits + ".,!"
VISION: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 8,
    "projection_dim": 12,
}  # fmt: skip
TEXT: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SMALL: dict[str, Any] = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
SQUASHED: dict[str, Any] = {"size": {"height": 32, "width": 32}}


def write_hub_folder(folder: Path, kind: str, **saving: Any) -> Any:
    """Write the folder; returns the model of transformers. `siglip2-fixed` is SigLIP 2 as published for one size."""
    torch.manual_seed(3)
    tokenizer, places = _tokenizer(kind, folder)
    config = _config(kind, tokenizer, places)
    model: Any = getattr(transformers, type(config).__name__.replace("Config", "Model"))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, **saving)
    tokenizer.save_pretrained(folder)
    _pictures(kind).save_pretrained(folder)
    if kind.startswith("siglip2"):  # the files on the hub name the class that Google used
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "GemmaTokenizer"}))
    return model.eval()


def _config(kind: str, tokenizer: Any, places: int) -> Any:
    text = TEXT | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": places,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = VISION | {"image_size": 32}
    if kind == "clip":
        text |= {"eos_token_id": tokenizer.eos_token_id}
        return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    if kind == "metaclip_2":
        text |= {"eos_token_id": tokenizer.eos_token_id}
        return transformers.MetaClip2Config(text_config=text, vision_config=vision, projection_dim=12)
    if kind == "altclip":
        return transformers.AltCLIPConfig(
            text_config=text | {"project_dim": 14}, vision_config=vision, projection_dim=12
        )
    if kind == "chinese_clip":
        return transformers.ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    if kind == "siglip2":
        return transformers.Siglip2Config(text_config=text, vision_config=VISION | {"num_patches": 16})
    return transformers.SiglipConfig(text_config=text, vision_config=vision)


def _pictures(kind: str) -> Any:
    if kind == "siglip2":
        return transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    if kind.startswith("siglip"):
        return transformers.SiglipImageProcessor(**SQUASHED)
    if kind == "chinese_clip":  # as published: squashed, not cropped
        return transformers.ChineseCLIPImageProcessor(**SQUASHED, do_center_crop=False)
    return transformers.CLIPImageProcessor(**SMALL)


def _tokenizer(kind: str, folder: Path) -> tuple[Any, int]:
    """The tokenizer, and how many places the text tower has."""
    if kind == "clip":
        pieces = [
            *LETTERS,
            *(letter + "</w>" for letter in LETTERS),
            "re",
            "red</w>",
            "<|startoftext|>",
            "<|endoftext|>",
        ]
        merges: Any = [("r", "e"), ("re", "d</w>")]
        vocab = {piece: place for place, piece in enumerate(dict.fromkeys(pieces))}
        return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=20), 20
    if kind == "siglip":
        return _siglip_tokenizer(folder), 16
    if kind.startswith("siglip2"):
        return _gemma_tokenizer(), 16
    if kind == "chinese_clip":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "红", "苹", "果", "red", "apple", "##s", "a"]
        return transformers.BertTokenizer({word: place for place, word in enumerate(words)}), 60
    special = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [*special, ("▁", -2.0), ("▁red", -3.0), *((piece, -4.0) for piece in LETTERS + "红苹果"), ("<mask>", 0.0)]
    return transformers.XLMRobertaTokenizer(vocab=pieces, model_max_length=20), 24


def _siglip_tokenizer(folder: Path) -> Any:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red apple", "two green pears and one sun", "the moon over a hill"] * 4),
        model_writer=model, vocab_size=27, bos_id=-1, pad_id=0, eos_id=1, unk_id=2, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    return transformers.SiglipTokenizer(str(folder / "spiece.model"), model_max_length=16)


def _gemma_tokenizer() -> Any:
    """As in the published file: byte fallback, an end token added, and padding to all places on the right."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, "▁", *LETTERS, *(f"<0x{byte:02X}>" for byte in range(256)), "re", "red"]
    vocab = {piece: place for place, piece in enumerate(dict.fromkeys(pieces))}
    inner = Tokenizer(
        models.BPE(vocab, [("r", "e"), ("re", "d")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    inner.enable_padding(length=16, pad_id=0, pad_token="<pad>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        mask_token="<mask>", model_max_length=16, padding_side="right",
    )  # fmt: skip
