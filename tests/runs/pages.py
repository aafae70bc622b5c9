"""Folders of runs and their reports, read as a browser would: what tests of reports share."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zinit.data.images import THUMBNAIL_START
from zinit.runs.report import write_report

RUN = {
    "backbone": "llama",
    "task": "alpaca",
    "model": "embedded demo",
    "data": "embedded demo",
    "demo": True,
    "seed": 7,
    "preset": None,
    "prefix": {"length": 10, "layers": 2},
    "train": {"learning_rate": 0.009, "scheduler": {"warmup": 2}},
}
METRICS = {
    "metrics": {
        "frozen": {"loss": 3.5, "perplexity": 33.12, "exact_match": 0.0},
        "adapted": {"loss": 1.25, "perplexity": 3.49, "exact_match": 0.75},
    },
    "counts": {"train": 1000, "held_out": 200, "evaluated": 120, "truncated": 3, "skipped": 0},
    "samples": [{"prompt": "Where?", "expected": "Oldport.", "frozen": "the the", "adapted": "Oldport."}],
    "seconds": 12.5,
    "steps": 20,
    "seed": 7,
}
VOID = {"meta", "link", "br", "hr", "img", "input"}


def step(number: int, loss: float = 1.0) -> dict[str, Any]:
    rates = {"examples_per_second": 160.0, "tokens_per_second": 9000.0}
    return {
        "event": "step",
        "step": number,
        "loss": loss,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "examples": 32,
        "seconds": 0.2,
    } | rates


def gates(number: int, layers: int = 2, heads: int = 4, value: float = 0.1) -> dict[str, Any]:
    sites = {f"model.layers.{layer + 2}.self_attn": [number * value] * heads for layer in range(layers)}
    return {"event": "gates", "step": number, "gates": sites}


def log_of(steps: int, every: int = 5, **shape: int) -> list[dict[str, Any]]:
    lines = [{"event": "plan", "steps": steps, "done": 0}, gates(0, **shape)]
    for number in range(1, steps + 1):
        lines.append(step(number, 3.0 / number))
        if number % every == 0 or number == steps:
            lines += [gates(number, **shape), {"event": "eval", "step": number, "loss": 2.0, "exact_match": 0.5}]
    return [*lines, {"event": "end", "step": steps}]


def page_of(
    folder: Path, log: list[dict[str, Any]] | str | None, run: Any = RUN, metrics: Any = METRICS
) -> tuple[str, Page]:
    text = log if isinstance(log, str) or log is None else "".join(json.dumps(line) + "\n" for line in log)
    for name, content in (("run.json", run), ("metrics.json", metrics), ("log.jsonl", text)):
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    before = {path.name for path in folder.iterdir()}
    path = write_report(folder)
    assert path == folder / "report.html"
    assert {path.name for path in folder.iterdir()} == before | {"report.html"}  # no temporary file
    html = path.read_text("utf-8")
    return html, Page(html)


class Page(HTMLParser):
    """Checks while it reads that every element is closed, ids are unique, and nothing is fetched or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.text: list[str] = []
        self.images: list[np.ndarray] = []
        self.curves: list[int] = []
        self.pictures: list[Image.Image] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.words = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object", "embed")
        if tag == "img":
            source = dict(attrs)["src"] or ""
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(source.removeprefix(THUMBNAIL_START)))))
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name == "id":
                assert value not in self.ids
                self.ids.add(value or "")
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                assert value is not None
                assert value.startswith(("#", "data:")), value
                if value.startswith("data:image/png;base64,"):
                    from matplotlib.image import imread

                    self.images.append(imread(io.BytesIO(base64.b64decode(value.partition(",")[2])), "png"))
            elif not name.startswith("xmlns"):
                assert "://" not in (value or "")
            assert all(found == "#" for found in re.findall(r"url\(['\"]?(.)", value or ""))
            if name == "d":
                self.curves.append((value or "").count("L"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            assert "@import" not in data
            assert "url(" not in data
        else:
            self.text.append(data)
