"""Pictures that are uploaded and drawn anew in part, by OpenAI's own client."""

from __future__ import annotations

import base64
import io

import numpy
import openai
import pytest
from PIL import Image, ImageDraw

from mmwudao.canvas import SEAM, masked_canvas
from mmwudao.service.draw_requests import DrawRequest, draw_block
from tests.helpers.http import CLIENT
from tests.helpers.service_server import png, running, tiny_pipeline, tiny_served


@pytest.fixture(scope="module")
def pipe(filling_model_dir):
    return tiny_pipeline(filling_model_dir)


@pytest.fixture(scope="module")
def address(filling_model_dir):
    with running(tiny_served(filling_model_dir)) as url:
        yield url


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        yield client


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def decoded(b64: str | None) -> Image.Image:
    assert b64 is not None
    return Image.open(io.BytesIO(base64.b64decode(b64)))


PICTURE = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=numpy.uint8))
HOLE = (8, 16, 24, 24)  # two codes


def mask(mode: str = "RGBA", size: tuple[int, int] = (32, 32)) -> Image.Image:
    made = Image.new(mode, size, "white")
    ImageDraw.Draw(made).rectangle((HOLE[0], HOLE[1], HOLE[2] - 1, HOLE[3] - 1), (0,) * len(mode))
    return made


def test_an_edit_is_what_complete_draws(client, pipe):
    answer = client.images.edit(
        image=encoded(PICTURE), mask=encoded(mask()), prompt="红心", n=2, size="32x32", model="tiny",
        response_format="b64_json", extra_body={"seed": 5, "temperature": 0.5},
    )  # fmt: skip
    expected = pipe.complete(PICTURE, "红心", mask(), n=2, seed=5, sampling={"temperature": 0.5})
    assert [decoded(one.b64_json).tobytes() for one in answer.data] == [one.tobytes() for one in expected]
    first = numpy.asarray(decoded(answer.data[0].b64_json))
    assert (first[: HOLE[1] - SEAM] == numpy.asarray(PICTURE)[: HOLE[1] - SEAM]).all()
    assert decoded(answer.data[0].b64_json).info["kept"] == "a mask"


@pytest.mark.parametrize("kind", ["its own hole", "a JPEG", "black and white", "a list"])
def test_masks_are_what_clients_send(client, pipe, kind):
    hole = PICTURE.convert("RGBA")
    hole.paste((0, 0, 0, 0), HOLE)
    image: object = encoded(PICTURE)
    masks = {"a JPEG": encoded(mask("RGB"), "JPEG"), "black and white": encoded(mask("L")), "a list": encoded(mask())}
    if kind == "its own hole":
        image = encoded(hole)
    elif kind == "a list":
        image = [image]
    extra = {"mask": masks[kind]} if kind in masks else {}
    answer = client.images.edit(image=image, prompt="cat", extra_body={"seed": 1}, **extra)
    drawn = numpy.asarray(decoded(answer.data[0].b64_json))
    told = numpy.asarray(PICTURE)
    assert (drawn[: HOLE[1] - SEAM] == told[: HOLE[1] - SEAM]).all()
    assert (drawn[HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]] != told[HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]]).mean() > 0.9


def test_an_edit_streams(client, pipe):
    large = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    large.paste("white", (0, 0, 32, 8))
    events = list(
        client.images.edit(
            image=encoded(PICTURE), mask=encoded(large), prompt="红心", stream=True, partial_images=2,
            extra_body={"seed": 5},
        )
    )  # fmt: skip
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    preview, whole = decoded(events[0].b64_json), decoded(events[-1].b64_json)
    assert preview.getpixel((31, 31)) == (255, 255, 255)
    assert preview.crop((0, 0, 32, 5)).tobytes() == whole.crop((0, 0, 32, 5)).tobytes()
    (expected,) = pipe.complete(PICTURE, "红心", large, seed=5)
    assert whole.tobytes() == expected.tobytes()


def test_a_picture_goes_on_beyond_a_side(client):
    answer = client.images.edit(image=encoded(PICTURE), prompt="cat", extra_body={"extend": "left:0.25"})
    assert decoded(answer.data[0].b64_json).size == (40, 32)


def test_variations(client):
    first, again, other = (
        client.images.create_variation(image=encoded(PICTURE), n=2, extra_body={"seed": seed, "strength": strength})
        for seed, strength in ((1, 0.25), (1, 0.25), (1, 1.0))
    )
    assert [one.b64_json for one in first.data] == [one.b64_json for one in again.data]
    assert first.data[0].b64_json != other.data[0].b64_json
    prompted = client.images.create_variation(image=encoded(PICTURE), extra_body={"prompt": "cat", "seed": 1})
    assert decoded(prompted.data[0].b64_json).info["prompt"] == "cat"
    assert decoded(prompted.data[0].b64_json).info["kept"] == "all but 0.5"


def test_pictures_of_one_mask_are_drawn_together_and_no_others(pipe):
    canvas, other = (masked_canvas(pipe.canvas_format, PICTURE, mask()) for _ in range(2))
    drawings = pipe.plan("红心", 2, seed=5)
    one, two, three = DrawRequest(drawings[0], canvas=canvas), DrawRequest(drawings[1], canvas=canvas), canvas
    assert one.key == two.key
    assert one.key not in (DrawRequest(drawings[0]).key, DrawRequest(drawings[0], canvas=other).key)
    together = draw_block(pipe, [one, two])
    assert [x.tobytes() for x in together] == [x.tobytes() for x in pipe.complete(PICTURE, "红心", mask(), 2, seed=5)]
    assert three.known == 14


GOOD = {"image": encoded(PICTURE), "mask": encoded(mask())}


@pytest.mark.parametrize(
    ("files", "fields", "param", "message"),
    [
        ({"mask": encoded(mask(size=(48, 32)))}, {}, "mask", "the mask has 48x32 pixels and the picture 32x32"),
        ({"mask": encoded(Image.new("RGBA", (32, 32)))}, {}, "mask", "must leave something to keep"),
        ({"mask": encoded(Image.new("L", (32, 32), 255))}, {}, "mask", "must leave something to draw"),
        ({"mask": b"text"}, {}, "mask", "not a picture"),
        ({"mask": None}, {}, "mask", "no mask: send one, or a picture with a transparent part"),
        ({"mask": None, "image": encoded(PICTURE.convert("RGBA"))}, {}, "mask", "no mask"),
        ({"image": b"text"}, {}, "image", "not a picture"),
        ({"image": None}, {}, "image", "no picture: upload one as the file 'image'"),
        ({"photo": png()}, {}, "photo", "files are sent as image and mask"),
        ({}, {"prompt": ""}, "prompt", "empty prompt"),
        ({}, {"prompt": None}, "prompt", "prompt"),
        ({}, {"n": "0"}, "n", "n must be at least 1"),
        ({}, {"n": "x"}, "n", "n must be a whole number"),
        ({}, {"size": "64x65"}, "size", "this model draws in these sizes"),
        ({}, {"extend": "left:0.5"}, "extend", "a mask or extend, not both"),
        ({"mask": None}, {"extend": "up:0.5"}, "extend", "say a side"),
        ({}, {"strenght": "1"}, "strenght", "there is no such field"),
        ({}, {"model": "other"}, "model", "no model of that name"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(address, files, fields, param, message):
    sent = {name: (f"{name}.png", value) for name, value in {**GOOD, **files}.items() if value is not None}
    told = {name: value for name, value in {"prompt": "cat", **fields}.items() if value is not None}
    answer = CLIENT.post(f"{address}/v1/images/edits", data=told, files=sent)
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["param"] == param


def test_json_is_refused(address):
    for path in ("edits", "variations"):
        answer = CLIENT.post(f"{address}/v1/images/{path}", json={"prompt": "cat"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
        assert "multipart/form-data" in answer.json()["error"]["message"]
    described = CLIENT.get(f"{address}/openapi.json").json()["paths"]
    form = described["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"image", "prompt"} == set(form["required"])
    assert {"mask", "extend", "temperature"} <= set(form["properties"])
    form = described["/v1/images/variations"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["image"]
    assert "mask" not in form["properties"]


def test_a_model_that_does_not_fill_says_so(tiny_model_dir):
    with running(tiny_served(tiny_model_dir)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        with pytest.raises(openai.BadRequestError, match="was not trained to fill holes"):
            client.images.edit(image=encoded(PICTURE), mask=encoded(mask()), prompt="cat")
        below = mask()
        below.paste((0, 0, 0, 0), (0, 16, 32, 32))
        answer = client.images.edit(image=encoded(PICTURE), mask=encoded(below), prompt="cat")
        assert answer.data
        assert decoded(answer.data[0].b64_json).size == (32, 32)
        answer = client.images.create_variation(image=encoded(PICTURE), extra_body={"strength": 0.5})
        assert answer.data
