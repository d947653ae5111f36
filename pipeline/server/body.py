"""Request bodies within a limit of size and time, and the check of the key."""

from __future__ import annotations

import asyncio
import hmac

from starlette.requests import ClientDisconnect, Request

from pipeline.server.errors import ApiError

BODY_TIMEOUT_S = 60.0
DRAIN_BYTES, DRAIN_S = 256 << 20, 10.0
"""What is read and dropped before a refusal: a client that is still sending would see a reset instead of the reason."""


async def read_body(request: Request, limit: int) -> bytes:
    """Read the body of a JSON request.

    Raises:
        ApiError: 413 for more than ``limit`` bytes, 415 for another content type (a page of another site can send such
            a request without asking), 408 when the client is too slow.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the content type must be application/json")
    too_large = ApiError(413, f"the request has more than {limit / (1 << 20):g} MiB: send fewer or smaller images")
    if int(request.headers.get("content-length") or 0) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from error
    except ClientDisconnect as error:
        raise ApiError(400, "the client closed the connection") from error
    return bytes(body)


async def drain(request: Request) -> None:
    """Read and drop what a refused client is still sending, within limits."""
    left = DRAIN_BYTES
    try:
        async with asyncio.timeout(DRAIN_S):
            while left > 0:
                message = await request.receive()
                left -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
    except TimeoutError:
        return


def check_key(request: Request, key: str) -> None:
    """Compare the bearer token with the server's key; an empty key admits everyone. Raises ApiError 401."""
    if not key:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    same = hmac.compare_digest(given.strip().encode(), key.encode())
    if scheme.lower() != "bearer" or not same:
        raise ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key")
