"""Input decoding: what clients send is checked against the limits and turned into texts and pictures."""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar
from urllib.parse import unquote

import torch
from PIL import Image

from data.characters import is_blank
from data.images import open_image
from mmwudao.service.errors import BadInput, ServiceError, refusals
from mmwudao.service.fetching import fetch
from mmwudao.service.schemas import ImagePart, TextPart
from mmwudao.service.settings import ServiceConfig

T = TypeVar("T")

Part = TextPart | ImagePart
Source = Part | bytes  # bytes: an uploaded picture


class InputDecoder:
    """Checks inputs against the limits of one service, and decodes pictures in threads of its own."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        # a picture is too small for PyTorch to share among threads
        self._executor = ThreadPoolExecutor(
            os.cpu_count() or 1, thread_name_prefix="decode", initializer=partial(torch.set_num_threads, 1)
        )

    def close(self) -> None:
        self._executor.shutdown()

    def check_count(self, count: int, most: int, param: str) -> None:
        """Raises `BadInput` for more than `most`."""
        if count > most:
            raise BadInput(f"{count} of them in one request: at most {most}", param=param)

    def text(self, text: str, param: str = "input") -> str:
        """The text as it is. Raises `BadInput` for an overlong one, and one of nothing visible."""
        if is_blank(text):
            raise BadInput("an empty text", param=param)
        if len(text) > self._config.max_text:
            raise BadInput(f"a text of {len(text)} characters: at most {self._config.max_text}", param=param)
        return text

    async def pictures(
        self,
        sources: Sequence[str | bytes],
        prepare: Callable[[Image.Image], T],
        params: Sequence[str],
        *,
        alpha: bool = False,
    ) -> list[T]:
        """`prepare` of each picture: encoded bytes, a data URI, or a URL; `params` are their names in the request.

        With `alpha` pictures keep their transparency. Raises `BadInput`, `TooLarge`.
        """
        loop = asyncio.get_running_loop()

        def ready(source: str | bytes, param: str) -> T:
            return prepare(self._decode(source, param, alpha))

        async def fetched(url: str, param: str) -> T:
            try:
                encoded = await fetch(url, self._config.max_fetch, self._config.fetch_deadline)
            except ServiceError as error:
                error.param = param
                raise
            return await loop.run_in_executor(self._executor, ready, encoded, param)

        urls = [isinstance(source, str) and _looks_like_url(source) for source in sources]
        if any(urls) and not self._config.allow_urls:
            named = params[urls.index(True)]
            raise BadInput("this server fetches no URLs: send the picture as a data URI", param=named)
        futures = [
            asyncio.ensure_future(
                fetched(str(source).strip(), param)
                if url
                else loop.run_in_executor(self._executor, ready, source, param)
            )
            for source, url, param in zip(sources, urls, params, strict=True)
        ]
        try:
            return [await future for future in futures]
        finally:
            for future in futures:
                future.cancel()
            await asyncio.gather(*futures, return_exceptions=True)

    def _decode(self, source: str | bytes, param: str, alpha: bool) -> Image.Image:
        encoded = data_uri(source, param) if isinstance(source, str) else source
        with refusals(param):
            return open_image(encoded, self._config.max_pixels, alpha=alpha)


def split_input(content: str | Part | Sequence[str | Part]) -> list[Part]:
    """The texts and pictures of an embedding request: a string that begins with data:image/ is a picture."""

    def split(part: str | Part) -> Part:
        if not isinstance(part, str):
            return part
        return ImagePart(image=part) if _looks_like_picture(part) else TextPart(text=part)

    return [split(content)] if isinstance(content, str | TextPart | ImagePart) else list(map(split, content))


def data_uri(text: str, param: str) -> bytes:
    """The bytes of a base64 data URI of a picture. Raises `BadInput`."""
    head, comma, body = text.strip().partition(",")
    if not _looks_like_picture(head) or not comma or not head.lower().endswith(";base64"):
        raise BadInput("a picture is sent as a data URI: data:image/png;base64,...", param=param)
    if "%" in body:
        body = unquote(body)  # as in any URI (RFC 2397)
    try:
        # tools break lines at 76 characters (RFC 2045)
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInput("a picture's data URI does not hold base64", param=param) from error


def _looks_like_url(text: str) -> bool:
    return text[:40].lstrip()[:8].lower().startswith(("http://", "https://"))


def _looks_like_picture(text: str) -> bool:
    return text[:40].lstrip()[:11].lower() == "data:image/"
