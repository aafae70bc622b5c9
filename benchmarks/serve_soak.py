"""Serving for long: memory over many requests, clients that vanish in the middle of an answer, malformed bodies.

A server over the demo's LLaMA on loopback, in this process, with adapters of which half tune the host.

    python -m benchmarks.serve_soak                    # 10,000 requests, 200 vanishing clients, 1,000 bodies
    python -m benchmarks.serve_soak --requests 500     # a short try
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import torch
import uvicorn

from benchmarks.common import RESULTS, save
from benchmarks.serve import make_adapters
from zinit.demo import instructions, llama_path
from zinit.serve.engine import Engine
from zinit.serve.http import make_app
from zinit.serve.requests import Limits
from zinit.serve.served import Models

PARTS = 10  # memory is read so often while the requests are answered


@contextmanager
def listening(app: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def body(text: str, number: int, adapters: int, tokens: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": f"user{number % adapters}", "messages": messages, "max_tokens": tokens, "temperature": 0, **more}


async def ask_many(address: str, bodies: list[dict[str, Any]], clients: int) -> Counter[int]:
    """Statuses of the answers; so many requests at a time."""
    found: Counter[int] = Counter()
    waiting = iter(bodies)
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:

        async def work() -> None:
            for each in waiting:
                found[(await client.post("/v1/chat/completions", json=each)).status_code] += 1

        await asyncio.gather(*(work() for _ in range(clients)))
    return found


async def vanish(address: str, bodies: list[dict[str, Any]]) -> int:
    """Clients that read a little of a stream and close it. Returns how many had begun to read."""
    begun = 0

    async def one(each: dict[str, Any]) -> None:
        nonlocal begun
        async with (
            httpx.AsyncClient(base_url=address, timeout=600) as client,
            client.stream("POST", "/v1/chat/completions", json=each) as answer,
        ):
            async for _ in answer.aiter_bytes():
                begun += 1
                return

    await asyncio.gather(*(one(each) for each in bodies))
    return begun


async def malformed(address: str, good: dict[str, Any], count: int) -> Counter[int]:
    """Bodies with bytes changed, left out or put in, and with values of another type."""
    draw, found = random.Random(0), Counter[int]()
    whole = httpx.Request("POST", address, json=good).content
    values = [None, -1, 1e308, "", [], {}, True, "x" * 5000, [[]], 10**30]
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        for number in range(count):
            if number % 2:
                sent = httpx.Request("POST", address, json=good | {draw.choice([*good]): draw.choice(values)}).content
            else:
                data = bytearray(whole)
                for _ in range(draw.randint(1, 5)):
                    data[draw.randrange(len(data))] = draw.randrange(256)
                sent = bytes(data[: draw.randint(0, len(data))])
            answer = await client.post("/v1/chat/completions", content=sent)
            found[answer.status_code // 100 * 100] += 1
    return found


def memory() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default=str(llama_path()), help="default: the demo's")
    options.add_argument("--requests", type=int, default=10_000)
    options.add_argument("--vanishing", type=int, default=200)
    options.add_argument("--bodies", type=int, default=1_000)
    options.add_argument("--adapters", type=int, default=16)
    options.add_argument("--tuned", type=int, default=8)
    options.add_argument("--prefix-length", type=int, default=10)
    options.add_argument("--layers", type=int, default=None)
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--tokens", type=int, default=6)
    options.add_argument("--output", type=Path, default=None)
    options = options.parse_args()
    options.device = "cpu"
    torch.set_num_threads(1)
    texts = [record["instruction"] for record in instructions()[0]]
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(options, Path(folder))
        first = str(Path(folder) / "user0")
        models = Models(first, model=options.model, template="alpaca", device=torch.device("cpu"))
        for number in range(options.adapters):
            models.add(f"user{number}", str(Path(folder) / f"user{number}"))
    engine = Engine(models, Limits(batch=64, queue=1024)).start()
    bodies = [body(texts[n % len(texts)], n, options.adapters, options.tokens) for n in range(options.requests)]
    size = max(1, len(bodies) // PARTS)
    statuses: Counter[int] = Counter()
    megabytes: list[float] = []
    with listening(make_app(engine)) as address:
        began = time.perf_counter()
        for start in range(0, len(bodies), size):
            statuses += asyncio.run(ask_many(address, bodies[start : start + size], options.clients))
            megabytes.append(round(memory(), 1))
        seconds = time.perf_counter() - began
        long = [body(texts[n % len(texts)], n, options.adapters, 200, stream=True) for n in range(options.vanishing)]
        begun = asyncio.run(vanish(address, long))
        left = time.perf_counter()
        while engine.gauges()["running"] or engine.gauges()["waiting"]:
            time.sleep(0.01)
        gone = time.perf_counter() - left
        wrong = asyncio.run(malformed(address, bodies[0], options.bodies))
        after = asyncio.run(ask_many(address, bodies[:8], 8))
    report = {
        "statuses": dict(statuses),
        "seconds": round(seconds, 1),
        "megabytes_after_each_tenth": megabytes,
        "vanished_while_reading": begun,
        "seconds_until_they_were_gone": round(gone, 2),
        "statuses_of_malformed_bodies": dict(sorted(wrong.items())),
        "statuses_after": dict(after),
    }
    engine.stop()
    options.model = Path(options.model).name
    options.output = options.output or RESULTS / "serve-soak-cpu.json"
    save("serve_soak", options, report)


if __name__ == "__main__":
    main()
