"""The page of ``zinit chat --web``: one file without outside resources, that asks the API beside it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the page shows. It asks two models: "adapted" and "base".

    Attributes:
        title: of the run.
        about: what it is, in a line.
        sees: whether the adapter takes images.
        most: tokens of an answer that may be asked for.
        gates: ({"name": of a site, "values": of its heads}, ...), when they are asked for.
        sampling: what the settings show at first: temperature, top_p, max_tokens, system, seed.
    """

    title: str
    about: str
    sees: bool
    most: int
    gates: Callable[[], list[dict[str, Any]]]
    sampling: dict[str, Any] = field(default_factory=dict)


def add_page(app: FastAPI, page: Page) -> None:
    """Adds the page and what it asks for besides the API."""
    html = files("zinit.serve").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": policy(html),
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }

    @app.get("/", response_model=None)
    async def show() -> Response:
        return HTMLResponse(html, headers=headers)

    @app.get("/page/facts")
    async def facts() -> dict[str, Any]:
        return {**vars(page), "gates": page.gates()}


def policy(html: str) -> str:
    """What a browser lets the page do: its own script and style, requests to this server, images given as data."""

    def own(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    allowed = f"script-src {own('script')}; style-src {own('style')}; connect-src 'self'; img-src data:"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
