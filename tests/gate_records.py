"""What `gate.py` records of pictures, arrays, weights, logs and answers, and how two records are compared."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

VARYING = {"seconds", "samples_per_second", "created", "created_at", "operationId", "summary"}  # left out
LONG_LIST = 16  # longer lists of numbers are recorded by their hash and first few


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def array_record(array: numpy.ndarray) -> dict[str, Any]:
    """An array's hash, and a few numbers for a comparison with a tolerance."""
    first = array.ravel()[:4].tolist()
    return {"shape": list(array.shape), "sum": float(array.sum(dtype="float64")), "first": first,
            "sha256": sha256(numpy.ascontiguousarray(array).tobytes())}  # fmt: skip


def picture_record(source: Path | bytes) -> dict[str, Any]:
    """A picture's pixels, by hash, and the recipe inside it."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return {"size": list(image.size), "pixels": sha256(image.convert("RGB").tobytes()), "recipe": dict(image.info)}


def pictures_record(folder: Path) -> dict[str, Any]:
    return {path.name: picture_record(path) for path in sorted(folder.glob("*.png"))}


def weights_record(folder: Path) -> dict[str, Any]:
    """The tensors of all safetensors files below `folder`, by hash; the file format is read here, for bfloat16."""
    record = {}
    for path in sorted(folder.rglob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items()):
            first, last = (start + offset for offset in entry["data_offsets"])
            record[name] = f"{entry['dtype']} {entry['shape']} {sha256(data[first:last])[:16]}"
    return record


def codes_record(folder: Path) -> dict[str, Any]:
    """All arrays of codes in a folder of shards, by hash, a line a shard."""
    record = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            members = [(name, archive.extractfile(name)) for name in archive.getnames() if name.endswith(".npy")]
            arrays = {name: numpy.load(io.BytesIO(member.read())) for name, member in members if member}
        together = numpy.stack([array.astype("int64") for array in arrays.values()])
        record[path.name] = {"ids": sha256("\n".join(arrays).encode()), "codes": array_record(together)}
    return record


def log_record(out: Path) -> dict[str, Any]:
    """The figures of each step in a run's log; a step that was taken twice must have given the same twice."""
    steps: dict[str, dict[str, Any]] = {}
    for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines():
        figures = {name: value for name, value in json.loads(line).items() if name not in VARYING}
        known = steps.setdefault(str(figures["step"]), {})
        for name, value in figures.items():
            if known.setdefault(name, value) != value:
                raise ValueError(f"{out}: step {figures['step']} gave {name} {known[name]}, and {value} when resumed")
    return steps


def answer(address: str, case: dict[str, Any]) -> dict[str, Any]:
    """Status, content type and content of one answer."""
    body, kind = case.get("body", "").encode(), case.get("type", "application/json")
    if "json" in case:
        body = json.dumps(case["json"]).encode()
    if "upload" in case:
        kind = "multipart/form-data; boundary=gate"
        head = b'--gate\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        body = head + base64.b64decode(case["upload"].partition(",")[2]) + b"\r\n--gate--\r\n"
    method = case.get("method") or ("POST" if body else "GET")
    headers = {"Content-Type": kind} if body else {}
    request = urllib.request.Request(address + case["path"], body or None, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            status, content_type, text = response.status, response.headers["Content-Type"], response.read().decode()
    except urllib.error.HTTPError as error:
        status, content_type, text = error.code, error.headers["Content-Type"], error.read().decode()
    record: dict[str, Any] = {"status": status, "type": content_type}
    if content_type == "application/json":
        record["body"] = json.loads(text, object_hook=_with_picture)
    elif content_type.startswith("text/event-stream"):
        record["events"] = [
            json.loads(line[6:], object_hook=_with_picture) for line in text.splitlines() if line.startswith("data: ")
        ]
    elif content_type.startswith("text/plain"):  # of the metrics their names
        record["lines"] = sorted(line for line in text.splitlines() if line.startswith("# TYPE"))
    return record


def _with_picture(found: dict[str, Any]) -> dict[str, Any]:
    """An object of an answer, with the record of a picture in place of the picture."""
    encoded = found.get("b64_json")
    return found | {"b64_json": picture_record(base64.b64decode(encoded))} if isinstance(encoded, str) else found


def tidy(value: Any, work: Path, root: Path) -> Any:
    """A record without what varies: times and places are left out, long vectors become hashes."""
    if isinstance(value, dict):
        return {name: tidy(one, work, root) for name, one in value.items() if name not in VARYING}
    if isinstance(value, list) and len(value) > LONG_LIST and all(isinstance(one, float) for one in value):
        return array_record(numpy.array(value, dtype="float32"))
    if isinstance(value, list):
        return [tidy(one, work, root) for one in value]
    return value.replace(str(work), "WORK").replace(str(root), "ROOT") if isinstance(value, str) else value


def first_difference(before: Any, now: Any, tolerance: float, place: str = "") -> str | None:
    """Where two records differ first, in words; numbers may differ by `tolerance` of the larger. None: nowhere."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(name for name in now if name not in before)]:
            here = f"{place}.{name}" if place else name
            if name not in before or name not in now:
                return f"{here} {'is new' if name in now else 'is gone'}"
            if found := first_difference(before[name], now[name], tolerance, here):
                return found
        return None
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        found_ones = (first_difference(old, new, tolerance, f"{place}[{k}]") for k, (old, new) in pairs)
        return next((found for found in found_ones if found), None)
    if before == now or _close(before, now, tolerance):
        return None
    return f"{place}: {json.dumps(now, ensure_ascii=False)[:200]}, was {json.dumps(before, ensure_ascii=False)[:200]}"


def _close(before: Any, now: Any, tolerance: float) -> bool:
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (before, now))
    return numbers and abs(before - now) <= tolerance * max(abs(before), abs(now))
