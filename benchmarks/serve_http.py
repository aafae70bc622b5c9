"""Serving over HTTP: ``zinit serve`` and ``transformers serve``, each a process, on the same base, which answers alone.

Both get the same texts to go on with, as they stand, greedily, from clients that each wait for an answer before they
ask again. First tokens are those of the streams; tokens are counted in the texts, by the model's tokenizer.

    python -m benchmarks.serve_http                                                        # the demo's LLaMA
    python -m benchmarks.serve_http --model DIR --requests 32 --clients 8 --tokens 32
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
from transformers import AutoTokenizer

from benchmarks.common import RESULTS, save
from benchmarks.serve import figures, make_adapters
from zinit.demo import instructions, llama_path
from zinit.tasks.alpaca.template import format_prompt

Answer = tuple[float, float, str]  # seconds to the first token and to the last, text
ZINIT = (sys.executable, "-m", "zinit", "serve")
TRANSFORMERS = (sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve")


def commands(options: argparse.Namespace, adapter: Path) -> dict[str, tuple[list[str], str]]:
    """{name: command line without the port, the name of the base in requests}."""
    theirs = [*TRANSFORMERS, options.model, "--device", "cpu", "--dtype", "float32", "--log-level", "error"]
    found = {
        "zinit": (
            [
                sys.executable,
                "-m",
                "zinit",
                "serve",
                f"one={adapter}",
                "--model",
                options.model,
                "--template",
                "alpaca",
            ],
            "base",
        ),
        "transformers": (theirs, options.model),
    }
    if options.continuous:
        batching = ["--continuous-batching", "--attn-implementation", "sdpa"]
        found["transformers, continuous batching"] = ([*theirs, *batching], options.model)
    return found


@contextmanager
def listening(command: Sequence[str], threads: int) -> Iterator[str]:
    """Starts a server and waits until it answers; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--port", str(port)], env=variables, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            while not _answers(address):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"{' '.join(command)} ended:\n{log.read().decode(errors='replace')}")
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            process.wait()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


async def load(address: str, model: str, prompts: Sequence[str], options: argparse.Namespace) -> list[Answer]:
    """All answers, in the order of the prompts."""
    client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=3600)
    answers: list[Answer] = [(0.0, 0.0, "")] * len(prompts)

    async def ask(number: int) -> None:
        began, first, text = time.perf_counter(), 0.0, ""
        stream = await client.completions.create(
            model=model, prompt=prompts[number], max_tokens=options.tokens, temperature=0, stream=True
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].text:
                first = first or time.perf_counter() - began
                text += chunk.choices[0].text
        answers[number] = (first, time.perf_counter() - began, text)

    async def one_client(number: int) -> None:
        for each in range(number, len(prompts), options.clients):
            await ask(each)

    await asyncio.gather(*map(one_client, range(options.clients)))
    await client.close()
    return answers


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default=str(llama_path()), help="default: the demo's")
    options.add_argument("--requests", type=int, default=64)
    options.add_argument("--clients", type=int, default=16)
    options.add_argument("--tokens", type=int, default=64, help="longest answer")
    options.add_argument("--rounds", type=int, default=3, help="interleaved; medians are reported")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--continuous", action="store_true", help="also transformers' own continuous batching")
    options.add_argument("--output", type=Path, default=None)
    options = options.parse_args()
    options.device = "cpu"
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    texts = [format_prompt(record["instruction"]) for record in instructions()[0]]
    random.Random(0).shuffle(texts)
    prompts = texts[: options.requests]
    found: dict[str, list[tuple[float, list[Answer]]]] = {}
    with ExitStack() as servers:
        folder = Path(servers.enter_context(tempfile.TemporaryDirectory()))
        few = argparse.Namespace(model=options.model, adapters=1, tuned=0, prefix_length=10, layers=None)
        make_adapters(few, folder)
        ways = commands(options, folder / "user0")
        where = {name: servers.enter_context(listening(way, options.threads)) for name, (way, _) in ways.items()}
        for number in range(-1, options.rounds):  # the first one warms up
            for name, (_, model) in ways.items():
                began = time.perf_counter()
                answers = asyncio.run(load(where[name], model, prompts if number >= 0 else prompts[:4], options))
                if number >= 0:
                    found.setdefault(name, []).append((time.perf_counter() - began, answers))
    report: dict[str, Any] = {}
    for name, rounds in found.items():
        seconds, answers = sorted(rounds, key=lambda each: each[0])[len(rounds) // 2]
        tokens = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for _, _, text in answers]
        report[name] = figures(tokens, seconds, [each[0] for each in answers], [each[1] for each in answers])
        same = zip(answers, found["zinit"][0][1], strict=True)
        report[name]["answers_equal"] = f"{sum(a[2].strip() == b[2].strip() for a, b in same)} of {len(prompts)}"
        pairs = zip(rounds, found["zinit"], strict=True)
        report[name]["seconds_over_zinit"] = round(statistics.median(a[0] / b[0] for a, b in pairs), 3)
    options.model = Path(options.model).name
    options.output = options.output or RESULTS / f"serve-http-{options.model}-cpu.json"
    save("serve_http", options, report)


if __name__ == "__main__":
    main()
