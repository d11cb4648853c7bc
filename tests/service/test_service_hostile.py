"""Hostile input: hundreds of damaged and forged pictures, and whatever Schemathesis makes of the description."""

from __future__ import annotations

import io
import random
import struct
import zlib

import httpx2
import hypothesis
import pytest
import schemathesis
from PIL import Image

from mmwudao.service.queues import Served
from mmwudao.service.settings import ServiceConfig
from tests.helpers.http import CLIENT
from tests.helpers.service_server import data_uri, running, tiny_served
from tests.helpers.tiny_towers import ColourTowers

MAX_PIXELS = 2**20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def forged_png(width: int, height: int, pixels: bytes = b"", *extra: bytes) -> bytes:
    """A PNG whose header says what it likes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def real_picture(kind: str, seed: int) -> bytes:
    """A small picture of noise and one colour, in one of several modes."""
    generator = random.Random(seed)
    mode = generator.choice(["RGB", "L"] if kind in ("JPEG", "BMP") else ["RGB", "L", "RGBA", "P"])
    image = Image.frombytes("RGB", (24, 20), generator.randbytes(24 * 20 * 3)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def hostile_files() -> dict[str, bytes]:
    """Name -> content, the same in every run."""
    generator = random.Random(7)
    files: dict[str, bytes] = {}
    for kind in FORMATS:
        for number in range(12):  # cut short
            real = real_picture(kind, number)
            files[f"{kind}-cut-{number}"] = real[: generator.randrange(1, len(real))]
        for number in range(30):  # bytes changed, inserted, left out, repeated
            data = bytearray(real_picture(kind, 100 + number))
            for _ in range(generator.randint(1, 12)):
                place, how = generator.randrange(len(data)), generator.randrange(4)
                if how == 0:
                    data[place] = generator.randrange(256)
                elif how == 1:
                    data[place:place] = generator.randbytes(generator.randint(1, 9))
                elif how == 2:
                    del data[place : place + generator.randint(1, 9)]
                else:
                    data += data[place : place + 40]
                data = data or bytearray(b"\0")
            files[f"{kind}-changed-{number}"] = bytes(data)
        files[f"{kind}-tail"] = real_picture(kind, 1) + b"<script>alert(1)</script>" * 100
        header = real_picture(kind, 2)[:16]
        files[f"{kind}-header-of-noise"] = header + generator.randbytes(500)
        other = FORMATS[FORMATS.index(kind) - 1]
        files[f"{kind}-then-{other}"] = real_picture(kind, 3)[:40] + real_picture(other, 3)
    bomb = zlib.compress(b"\0" * 50_000_000, 9)
    sizes = [(2**31 - 1, 1), (1, 2**31 - 1), (60_000, 60_000), (2**16, 2**16), (0, 5), (5, 0), (1025, 1024)]
    for width, height in sizes:
        files[f"png-claims-{width}x{height}"] = forged_png(width, height, bomb)
    files["png-more-pixels-than-said"] = forged_png(4, 4, bomb)
    files["png-fewer-pixels-than-said"] = forged_png(500, 500, zlib.compress(b"\0" * 10))
    black = zlib.compress(b"\0" * 4)
    for name in ("zTXt", "iCCP"):
        files[f"png-{name}-bomb"] = forged_png(1, 1, black, chunk(name.encode(), b"a\0\0" + bomb))
    files["png-broken-checksum"] = forged_png(1, 1, black)[:-20] + b"\xff" * 20
    files["gif-of-4-gigapixels"] = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0," + b"\xff" * 40
    files["bmp-of-negative-size"] = b"BM" + struct.pack("<IIIIiiHH", 70, 0, 54, 40, -5, -5, 1, 24) + bytes(40)
    files["tiff-in-a-circle"] = b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHIII", 330, 4, 1, 8, 8)
    files["eps"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n"
    files["svg"] = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    files["pickle"] = b"cos\nsystem\n(S'true'\ntR."
    files["zip"] = b"PK\3\4" + generator.randbytes(100)
    files["pdf"] = b"%PDF-1.7\n" + generator.randbytes(100)
    files["elf"] = b"\x7fELF" + generator.randbytes(100)
    files["html"] = b"<html><img src=x onerror=alert(1)>"
    files["xbm"] = b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {0};"
    files["ppm"] = b"P6 99999 99999 255\n"
    files["psd"] = b"8BPS\0\1" + bytes(20)
    files["nothing"] = b""
    for number in range(40):
        files[f"noise-{number}"] = generator.randbytes(generator.randint(1, 2000))
    return files


FILES = hostile_files()


@pytest.fixture(scope="module")
def address():
    config = ServiceConfig(max_pixels=MAX_PIXELS, max_body=8 * 2**20)
    with running(Served("tiny", ColourTowers().eval()), config) as url:
        yield url


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_hostile_pictures_are_refused_or_answered_and_nothing_breaks(address):
    assert len(FILES) >= 300
    counts = {"refused": 0, "answered": 0}
    with httpx2.Client(timeout=60) as client:
        for number, (name, content) in enumerate(FILES.items()):
            if number % 2:
                answer = client.post(f"{address}/v1/embeddings", json={"input": data_uri(content)})
            else:
                answer = client.post(f"{address}/v1/embeddings", files={"file": (name, content)})
            if answer.status_code == 200:
                vector = answer.json()["data"][0]["embedding"]
                assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-4), name
                counts["answered"] += 1
            else:
                assert answer.status_code in (400, 413), (name, answer.text)
                assert "\n" not in answer.json()["error"]["message"]
                counts["refused"] += 1
        assert client.post(f"{address}/v1/embeddings", json={"input": "red"}).status_code == 200
        assert 'status="5' not in client.get(f"{address}/metrics").text
    # most are broken, and a damaged byte in a pixel is no reason to refuse
    assert counts["refused"] > 150
    assert counts["answered"] > 20


def test_pictures_of_too_many_pixels_are_refused_before_they_are_decoded(address):
    for name in FILES:
        if name.startswith("png-claims") and "x0" not in name and "-0x" not in name:
            answer = CLIENT.post(f"{address}/v1/embeddings", json={"input": data_uri(FILES[name])})
            assert answer.status_code == 413, (name, answer.text)


def test_several_pictures_fail_together_and_the_next_request_is_served(address):
    good = data_uri(real_picture("PNG", 1))
    answer = CLIENT.post(f"{address}/v1/embeddings", json={"input": [good, data_uri(FILES["noise-3"]), good]})
    assert answer.status_code == 400
    assert CLIENT.post(f"{address}/v1/embeddings", json={"input": [good, good]}).status_code == 200


def examine(strategy, seen: set[int], examples: int) -> None:
    """Send what `strategy` makes; no answer may be a failure of the server's. The statuses go to `seen`."""

    @hypothesis.settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(case=strategy)
    def check(case):
        answer = case.call(timeout=60)
        seen.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    check()


@pytest.mark.parametrize("examples", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_schemathesis_finds_no_server_error(tiny_model_dir, examples):
    """Every operation of the description, with examples that fit it and examples that do not."""
    statuses: dict[str, set[int]] = {}
    config = ServiceConfig(max_pictures=2, max_described=2)
    with running(tiny_served(tiny_model_dir), config) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        for result in schema.get_all_operations():
            operation = result.ok()  # type: ignore[union-attr]  # a bad description raises here
            strategy = hypothesis.strategies.one_of(
                operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE),
                operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE),
            )
            examine(strategy, statuses.setdefault(operation.label, set()), examples)
        assert CLIENT.get(f"{url}/readyz").status_code == 200
    assert len(statuses) == 20
    # it gets through to what the routes do
    for label in ("POST /v1/embeddings", "POST /v1/images/generations"):
        assert 200 in statuses[label], label
