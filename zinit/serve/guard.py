"""What every request passes first: the host's name, the key, the size of the body."""

from __future__ import annotations

import hmac
import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/health",)  # needs no key


class Guard:
    """An ASGI middleware.

    Args:
        app: what comes behind it.
        keys: any of these, if there are some.
        hosts: names that may be asked for; empty is any. A page on the web cannot reach a server on this machine under
            a name of its own.
        most: bytes of a body.
    """

    def __init__(self, app: ASGIApp, *, keys: frozenset[str], hosts: frozenset[str], most: int) -> None:
        self.app, self.hosts, self.most = app, hosts, most
        self.keys = [key.encode() for key in keys]
        self._too_large = f"the body has more than {most:,} bytes."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        refusal = self._refuse(scope["path"], headers)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        await self.app(scope, self._limited(receive), send)

    def _refuse(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
        if self.hosts and name not in self.hosts:
            return 421, "this server answers to this machine's own names only."
        given = headers.get(b"authorization", b"")
        token = given[7:].strip() if given[:7].lower() == b"bearer " else b""
        if self.keys and path not in OPEN and not any(hmac.compare_digest(token, key) for key in self.keys):
            return 401, "a key is needed: Authorization: Bearer KEY."
        try:
            length = int(headers.get(b"content-length", b"0"))
        except ValueError:
            return 400, "content-length is no number."
        return (413, self._too_large) if length > self.most else None

    def _limited(self, receive: Receive) -> Receive:
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most:
                raise HTTPException(413, self._too_large)
            return message

        return limited


async def _answer(send: Send, status: int, message: str) -> None:
    error: dict[str, Any] = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
