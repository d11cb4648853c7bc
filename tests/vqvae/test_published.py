"""Checkpoints of other projects: what their zip file, their pickle and their tensors may be."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import random
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from bench.load.mutations import PROGRAMS, zipped
from vqvae.storage.parts import ModelError
from vqvae.storage.published import check_tensors, layout_of, read_checkpoint, section
from vqvae.storage.unpickling import Damaged, check_program

SHAPES = {"a": (2, 3), "b": (4,)}


def tensors() -> dict:
    return {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}


def saved(path: Path, content: object = None) -> Path:
    torch.save(tensors() if content is None else content, path)
    return path


def repacked(path: Path, kind: int) -> Path:
    """The same file, zipped again as other programs do."""
    with zipfile.ZipFile(path) as file:
        members = [(name, file.read(name)) for name in file.namelist()]
    path.write_bytes(zipped(members, kind))
    return path


def check(path: Path) -> None:
    check_tensors(read_checkpoint(path), SHAPES, path)


# the zip file


def test_packed_members_are_unpacked_and_said(tmp_path, caplog):
    path = repacked(saved(tmp_path / "a.pt", {"large": torch.arange(200_000.0), **tensors()}), zipfile.ZIP_DEFLATED)
    with caplog.at_level(logging.WARNING):
        content = read_checkpoint(path)
    assert torch.equal(content["large"], torch.arange(200_000.0))
    assert torch.equal(content["a"], tensors()["a"])
    assert re.search(
        r"zipped again: \d+ members that are packed or not aligned are read into memory, 0.00 GB", caplog.text
    )


def test_aligned_members_are_mapped_and_nothing_is_said(tmp_path, caplog):
    path = saved(tmp_path / "a.pt")
    with caplog.at_level(logging.WARNING):
        mapped = read_checkpoint(path)
        assert not caplog.text
        copied = read_checkpoint(repacked(saved(tmp_path / "b.pt"), zipfile.ZIP_STORED))
    assert "not aligned" in caplog.text
    for content in (mapped, copied):
        assert torch.equal(content["a"], tensors()["a"])
        assert content["a"].data_ptr() % 8 == 0


def test_other_packings_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(ModelError, match="packed by method 12, and only DEFLATE is read: .* `zip -0 -r`"):
        read_checkpoint(repacked(saved(tmp_path / "a.pt"), zipfile.ZIP_BZIP2))


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_any_flipped_byte_of_a_tensor_is_found(tmp_path, kind):
    path = repacked(saved(tmp_path / "a.pt", {"w": torch.arange(16.0)}), kind)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        info = next(info for info in file.infolist() if info.filename.endswith("data/0"))
    start = info.header_offset + 30 + len(info.filename)
    refused = 0
    for place in range(start, start + info.compress_size):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        try:
            same = read_checkpoint(path)["w"]
        except ModelError as error:
            refused += bool(re.search("is damaged: .*(checksum|does not unpack)", str(error)))
        else:  # a bit of the packed stream that means nothing
            assert torch.equal(same, torch.arange(16.0))
    assert refused > 0.9 * info.compress_size
    assert kind == zipfile.ZIP_DEFLATED or refused == info.compress_size


def test_what_does_not_fit_into_memory_is_not_unpacked(tmp_path, monkeypatch):
    path = repacked(saved(tmp_path / "a.pt"), zipfile.ZIP_DEFLATED)
    monkeypatch.setattr("vqvae.storage.archive.free_host_bytes", lambda: 10)
    with pytest.raises(ModelError, match="GB do not fit into the 0.00 GB of free memory"):
        read_checkpoint(path)


def test_a_member_that_claims_more_than_its_bytes_can_give_is_refused(tmp_path):
    path = repacked(saved(tmp_path / "a.pt"), zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"PK\1\2") + 24, 2**31)
    path.write_bytes(data)
    with pytest.raises(ModelError, match="cannot have 2147483648 bytes"):
        read_checkpoint(path)


def test_what_is_no_zip_file_is_told_apart(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(tensors(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match=r"PyTorch 1.5 and older.*torch.load\(path, weights_only=True\)") as caught:
        read_checkpoint(path)
    assert "truncated" not in str(caught.value)
    whole = saved(tmp_path / "whole.pt").read_bytes()
    for content, message in (
        (b"", "is truncated: it is empty"),
        (whole[:-30], "is truncated: the end"),
        (pickle.dumps({}), "is a bare pickle"),
        (struct.pack("<Q", 2) + b"{}", "safetensors"),
        (b"<!DOCTYPE html>", "is a page or a pointer"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a page or a pointer"),
        (bytes(1000), "no PyTorch checkpoint"),
        (zipped([("model.pt", whole)]), "a zip file around model.pt: unpack it"),
        (zipped([("readme", b"")]), "no checkpoint of PyTorch: it has 0 data.pkl"),
        (zipped([("a/data.pkl", b""), ("a/data.pkl", b"")]), "have the same name"),
        (zipped([("a/data.pkl", b""), ("a/constants.pkl", b"")]), "a TorchScript archive"),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            read_checkpoint(path)


def test_the_other_order_of_bytes_is_refused(tmp_path):
    path = saved(tmp_path / "a.pt")
    with zipfile.ZipFile(path) as file:
        members = [(name, file.read(name)) for name in file.namelist()]
    path.write_bytes(zipped([(name, b"big" if name.endswith("byteorder") else data) for name, data in members]))
    with pytest.raises(ModelError, match="lowest byte first"):
        read_checkpoint(path)


# the pickle


class Call:
    def __reduce__(self):
        return os.mkdir, ("made",)


@pytest.mark.parametrize("name", [*PROGRAMS])
def test_no_pickle_is_run_or_ends_in_another_error(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = Path("a.pt")
    path.write_bytes(zipped([("a/data.pkl", PROGRAMS[name]), ("a/data/0", bytes(4))]))
    with pytest.raises(ModelError) as caught:
        check(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert [file.name for file in Path().iterdir()] == ["a.pt"]


def test_names_are_asked_for_in_any_protocol(tmp_path):
    for protocol in (2, 4):
        torch.save({"w": Call()}, tmp_path / "a.pt", pickle_protocol=protocol)
        with pytest.raises(ModelError, match="it asks for posix.mkdir"):
            read_checkpoint(tmp_path / "a.pt")
        torch.save(tensors(), tmp_path / "a.pt", pickle_protocol=protocol)
        check(tmp_path / "a.pt")


def test_keys_that_take_forever_to_hash_are_refused_before_the_pickle_runs():
    with pytest.raises(Damaged, match="keys are no text and no numbers"):
        check_program(PROGRAMS["nested keys"])
    check_program(pickle.dumps({"a": (1, [2.0]), 3: None, b"c": True}, 4))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x04", b"K\x05", "bytes instead of the 20 that it declares"),  # the number of elements of a storage
        (b"K\x02K\x03\x86", b"K\x02K\x04\x86", "does not lie in its storage of 24 bytes"),
        (b"K\x03K\x01\x86", b"K\x04K\x01\x86", "does not lie in its storage"),
        (b"FloatStorage", b"HalfStorage", "bytes instead of the 12 that it declares"),
    ],
)
def test_a_tensor_must_lie_in_its_storage(tmp_path, old, new, message):
    path = saved(tmp_path / "a.pt")
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    assert old in members[name]
    at = members[name].rindex(old) if old == b"K\x04" else members[name].index(old)
    members[name] = members[name][:at] + new + members[name][at + len(old) :]
    if old == b"K\x04":  # the last one is the shape of b, the one before it its storage
        at = members[name].rindex(b"K\x04", 0, at)
        members[name] = members[name][:at] + new + members[name][at + 2 :]
    path.write_bytes(zipped([*members.items()]))
    with pytest.raises(ModelError, match=message):
        read_checkpoint(path)


def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path):
    base = torch.randn(5, 6)
    content = {
        "view": base[1:, 2:],
        "transposed": base.T,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(3).half(),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "size": base.shape,
        "type": torch.float16,
        "nested": [{"a": (1, 2.5, "红", b"b", None, True)}],
        3: torch.arange(3),
    }
    path = saved(tmp_path / "a.pt", content)
    found, expected = read_checkpoint(path), torch.load(path, weights_only=True)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key].float(), value.float()), key
            assert found[key].stride() == value.stride()
        else:
            assert found[key] == value
    module = torch.nn.BatchNorm1d(3)
    state = read_checkpoint(saved(tmp_path / "b.pt", module.state_dict()))
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())


# the tensors


def odd(kind: str) -> object:
    plain = torch.arange(6.0).view(2, 3)
    return {
        "integers": plain.long(),
        "booleans": plain > 1,
        "complex": plain.to(torch.complex64),
        "float8": plain.to(torch.float8_e4m3fn),
        "sparse": plain.to_sparse(),
        "sparse rows": plain.to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "meta": plain.to("meta"),
        "negated": torch.view_as_complex(torch.stack([plain, plain], -1)).conj().imag,
        "strides": plain.T.contiguous().T,
        "one number": torch.ones(1).expand(2, 3),
        "NaN": plain.log() * 0,
        "infinite": plain.log(),
        "too large for float32": plain.double() + 1e300,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("integers", "of the type int64: a"),
        ("booleans", "of the type bool: a"),
        ("complex", "of the type complex64: a"),
        ("float8", "of the type float8_e4m3fn: a"),
        ("sparse", "sparse instead of plain: a"),
        ("sparse rows", "sparse instead of plain: a"),
        ("quantised", "quantised instead of plain: a"),
        ("meta", "meta no storage instead of plain: a"),
        ("negated", "negated or conjugated instead of plain: a"),
        ("strides", r"with strides \(store it with .contiguous\(\)\): a"),
        ("one number", "does not lie in its storage|with strides"),
        ("NaN", "with NaN or infinite numbers: a"),
        ("infinite", "with NaN or infinite numbers: a"),
        ("too large for float32", "with NaN or infinite numbers: a"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_odd_tensors_are_refused_by_name(tmp_path, kind, message):
    with pytest.raises(ModelError, match=message):
        check(saved(tmp_path / "a.pt", tensors() | {"a": odd(kind)}))


def test_plain_tensors_of_any_floating_type_pass(tmp_path):
    for kind in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        check(saved(tmp_path / "a.pt", {name: tensor.to(kind) for name, tensor in tensors().items()}))
    with pytest.raises(ModelError, match="float16 and bfloat16 in one file"):
        check(saved(tmp_path / "a.pt", {"a": tensors()["a"].half(), "b": tensors()["b"].bfloat16()}))
    counted = saved(tmp_path / "a.pt", tensors() | {"count": torch.tensor(3)})
    check_tensors(read_checkpoint(counted), SHAPES | {"count": ()}, counted, whole={"count"})


def test_two_tensors_in_one_place_are_refused_and_two_views_of_one_storage_are_not(tmp_path):
    flat = torch.arange(10.0)
    check(saved(tmp_path / "a.pt", {"a": flat[:6].view(2, 3), "b": flat[6:]}))
    with pytest.raises(ModelError, match="same numbers in memory as another: b"):
        check(saved(tmp_path / "a.pt", {"a": flat[:6].view(2, 3), "b": flat[5:9]}))


def test_many_strange_names_are_counted(tmp_path):
    others = {f"encoder.layer.{index}.weight\n": torch.ones(1) for index in range(300)} | {1.5: torch.ones(1)}
    wanted = {f"visual.{index}": (1,) for index in range(200)}
    path = saved(tmp_path / "a.pt", others)
    with pytest.raises(ModelError) as caught:
        check_tensors(read_checkpoint(path), wanted, path)
    message = str(caught.value)
    assert "missing: 200 tensors (visual.0, visual.1, visual.10, ...)" in message
    assert "unexpected: 301 tensors (1.5, encoder.layer.0.weight\\n, " in message
    assert message.endswith("it looks like no layout that is known here")
    assert len(message) < 500


def test_layouts_are_recognised():
    assert "BriVL" in layout_of({"learnable": {}})
    assert "import cogview --tokenizer" in layout_of({"module.quantize_t.embed": 0})
    assert "Hugging Face" in layout_of({"vision_model.a": 0})
    with pytest.raises(
        ModelError, match=r"no weights under the key 'module', but 5 keys \(0, 1, 2, ...\); it looks like"
    ):
        section(dict.fromkeys(range(5)), "module", Path("x"))


def test_garbage_is_one_line(tmp_path):
    draw = random.Random(0)
    stream = io.BytesIO()
    torch.save(tensors(), stream)
    data = bytearray(stream.getvalue())
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(8):
            changed[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / "a.pt").write_bytes(changed)
        with contextlib.suppress(ModelError):
            check(tmp_path / "a.pt")
            found = read_checkpoint(tmp_path / "a.pt")
            assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())
