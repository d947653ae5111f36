"""Images of requests: data URLs, files in one allowed folder, and hosts on a list; everything else is refused."""

from __future__ import annotations

import base64
import binascii
import http.client
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from data_prep.common.errors import short_repr
from data_prep.common.files import read_bounded
from data_prep.example import ImageRef
from data_prep.images.store import BadImage, declared_pixels
from pipeline.server.errors import ApiError

FETCH_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ImageRules:
    """Which images a request may name, and how large they may be."""

    folder: Path | None = None
    """Folder from which ``file:`` URLs may read; None: none."""
    hosts: tuple[str, ...] = ()
    """Hosts from which images are fetched; redirects are not followed."""
    max_images: int = 16
    """Images per request."""
    max_bytes: int = 20 << 20
    """Encoded size of one image."""
    max_pixels: int = 200_000_000
    """Pixels of all images of a request together; bounds the memory of decoding."""

    def read(self, urls: Sequence[str]) -> list[ImageRef]:
        """Read the images of a request, without decoding them.

        Raises:
            ApiError: naming the image by its number, 400 or 413.
        """
        if len(urls) > self.max_images:
            raise ApiError(413, f"the request has {len(urls)} images, the limit is {self.max_images}", param="messages")
        images, pixels = [], 0
        for number, url in enumerate(urls, start=1):
            name = f"{number} of the request"
            data = self._bytes(name, url)
            try:
                pixels += declared_pixels(data)
            except BadImage as error:
                raise ApiError(400, f"image {name} cannot be used: {error}", param="messages") from error
            if pixels > self.max_pixels:
                message = f"the images have more than {self.max_pixels / 1e6:g} megapixels together: send smaller ones"
                raise ApiError(413, message, param="messages")
            images.append(ImageRef(name, data=data))
        return images

    def _bytes(self, name: str, url: str) -> bytes:
        scheme = url[: url.find(":")].lower() if ":" in url[:16] else ""
        if scheme == "data":
            return self._decoded(name, url)
        if scheme == "file":
            return self._file(name, url)
        if scheme in ("http", "https"):
            return self._fetched(name, url)
        raise ApiError(400, f"image {name} is no URL: send data:image/...;base64,...", param="messages")

    def _decoded(self, name: str, url: str) -> bytes:
        header, comma, text = url.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise ApiError(400, f"image {name} is not base64: send data:image/...;base64,...", param="messages")
        if len(text) * 3 // 4 > self.max_bytes + 2:
            raise self._too_large(name)
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ApiError(400, f"image {name} is not valid base64: {error}", param="messages") from error

    def _file(self, name: str, url: str) -> bytes:
        if self.folder is None:
            message = f"image {name} is a file: URL, which this server does not read: send a data URL"
            raise ApiError(400, message, param="messages")
        refused = ApiError(400, f"image {name} is not a readable file in the server's image folder", param="messages")
        try:
            parts = urlsplit(url)
            root = self.folder.resolve()
            path = (root / unquote(parts.path)).resolve()
            if parts.netloc not in ("", "localhost") or not path.is_relative_to(root) or not path.is_file():
                raise refused
            if path.stat().st_size > self.max_bytes:
                raise self._too_large(name)
            return read_bounded(path, self.max_bytes)
        except (OSError, ValueError) as error:
            raise refused from error

    def _fetched(self, name: str, url: str) -> bytes:
        try:
            host = urlsplit(url).hostname
        except ValueError:
            host = None
        if host not in self.hosts:
            message = f"image {name} lies on a host that this server does not fetch from: send a data URL"
            raise ApiError(400, message, param="messages")
        try:
            with _OPENER.open(url, timeout=FETCH_TIMEOUT_S) as reply:
                data: bytes = reply.read(self.max_bytes + 1)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ApiError(400, f"image {name} cannot be fetched: {short_repr(error)}", param="messages") from error
        if len(data) > self.max_bytes:
            raise self._too_large(name)
        return data

    def _too_large(self, name: str) -> ApiError:
        return ApiError(413, f"image {name} has more than {self.max_bytes / (1 << 20):g} MiB", param="messages")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could lead to a host that is not on the list."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
