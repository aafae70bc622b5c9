"""Random wrong input: values of any type, documents with a node changed, files with bytes changed. All seeded."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

TEXTS = (
    "",
    " ",
    "none",
    "true",
    "0",
    "-1",
    "1e999",
    "nan",
    "../..",
    "\x00",
    "\ud800",
    "é",
    "a=b",
    "[",
    '"',
    "🦙" * 3,
    "x" * 500,
)
NUMBERS = (0, 1, -1, 2, 3, 2**31, -(2**63), 2**70, 0.0, -0.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"))
TOKENS = (
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"{",
    b"}",
    b"[",
    b"null",
    b"\n\n",
    b"\t",
    b",",
    b"-1",
    b"1e999",
    b"\xff" * 8,
    b"\x00" * 64,
    b"[" * 5000,  # deeper than parsers recurse
    b"9" * 5000,  # longer than Python reads as a number
    b"\x1b[2J\xc2\x9b2J",
    b'"' + b"x" * 140_000,  # longer than a field of a CSV file may be
)


def value(rng: Random, depth: int = 2) -> Any:
    """A plain value of any type."""
    kind = rng.randrange(7 if depth else 5)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind <= 2:
        return rng.choice(NUMBERS)
    if kind <= 4:
        return rng.choice(TEXTS)
    inner = [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return inner if kind == 5 else {str(rng.choice(TEXTS)): item for item in inner}


def document(rng: Random, valid: Any) -> Any:
    """A copy of a plain document with one to three nodes replaced, removed or repeated."""
    changed = copy.deepcopy(valid)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(changed))
        if not places:
            return value(rng)
        holder, key = rng.choice(places)
        how = rng.randrange(4)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif how == 1:
            holder[f"{key}{rng.choice(TEXTS)}"] = holder.pop(key)
        else:
            holder[key] = value(rng)
    return changed


def _places(node: Any) -> Any:
    """Every (container, key) of a document."""
    pairs = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    for key, inner in pairs:
        yield node, key
        yield from _places(inner)


def content(rng: Random, valid: bytes) -> bytes:
    """The bytes of a file with one to four of them cut, changed, inserted or repeated."""
    data = bytearray(valid)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 2, 8, 100)))
        how = rng.randrange(5)
        if how == 0:
            del data[start:]
        elif how == 1:
            del data[start:end]
        elif how == 2:
            data[start:start] = rng.choice(TOKENS)
        elif how == 3:
            data[start:start] = data[start:end] * rng.randint(1, 3)
        else:
            data[start:end] = bytes(rng.randrange(256) for _ in range(end - start))
    return bytes(data)


def json_content(rng: Random, valid: Any) -> bytes:
    """A JSON file: half of them parse and hold something wrong, the others have bytes changed."""
    if rng.random() < 0.5:
        return json.dumps(document(rng, valid)).encode("utf-8", "surrogatepass")
    return content(rng, json.dumps(valid).encode())
