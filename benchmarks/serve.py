"""Serving: 64 requests over 16 adapters in one batch, against one after another, and against one adapter alone.

The engine is measured without HTTP. Every way answers the same requests, greedily, and the answers are compared; gates
are open, so that adapters differ. One after another: ``model.generate`` for each request, under its adapter. A closed
loop: clients that each wait for an answer before they ask again. PEFT: its AdaptionPrompt, a model for each adapter.

    python -m benchmarks.serve                                   # the demo's LLaMA
    python -m benchmarks.serve --model DIR --tokens 32 --rate 2  # another base
    python -m benchmarks.serve --same-lengths --rounds 40        # a mixed batch beside one adapter's, step by step

How long answers are depends on the adapter, and a batch takes as many steps as its longest. ``--same-lengths`` gives
every request a length of its own instead, whoever answers it, so that batches differ by their adapters alone.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import zinit
from benchmarks.common import RESULTS, save
from zinit.data.conversations import Conversation, Round
from zinit.demo import instructions, llama_path
from zinit.models.loading import load_causal_lm
from zinit.serve.answer import AnswerText
from zinit.serve.apart import apart
from zinit.serve.engine import Engine
from zinit.serve.groups import Row
from zinit.serve.requests import Failed, Limits, Piece, Sampling, Turn
from zinit.serve.served import Models

Request = tuple[str, str]  # adapter, text
Way = Callable[[], dict[str, Any]]
Found = dict[str, list[dict[str, Any]]]  # of each way, a round after the other
SHORTEST = 4  # tokens of an answer by --same-lengths


@apart  # see there: only the engine's thread is to have computed when it is measured
def make_adapters(options: argparse.Namespace, folder: Path) -> None:
    """Adapters with open gates; the first ones tune the host too."""
    model, _ = load_causal_lm(options.model, dtype=torch.float32)
    for number in range(options.adapters):
        part = zinit.PrefixConfig(length=options.prefix_length, layers=options.layers, gate_init=0.3)
        config: Any = part
        if number < options.tuned:
            config = zinit.AdapterConfig(parts={"prefix": part}, tuning=zinit.TuningConfig())
        handle = zinit.attach(model, config, seed=number)
        handle.save(folder / f"user{number}")
        handle.detach()


class Endless(Engine):
    """No token and no text ends an answer: it is as long as it may be."""

    def _enqueue(self, rows: list[Row]) -> None:
        for row in rows:
            row.ends, row.text = frozenset(), AnswerText(row.text.tokenizer)
        super()._enqueue(rows)


def in_batches(
    engine: Engine, requests: list[Request], tokens: int, rate: float | None, seed: int = 0
) -> dict[str, Any]:
    """All requests at once, or as a Poisson process of so many a second."""
    lengths = [tokens] * len(requests)
    if isinstance(engine, Endless):
        lengths = random.Random(seed).choices(range(min(SHORTEST, tokens), tokens + 1), k=len(requests))
    draw, lock, over = random.Random(seed), threading.Lock(), threading.Event()
    first: dict[int, float] = {}
    whole: dict[int, float] = {}
    answers: dict[int, tuple[int, ...]] = {}

    def receiver(number: int, started: float) -> Any:
        def take(event: Piece | Failed) -> None:
            now = time.perf_counter()
            assert isinstance(event, Piece), event
            with lock:
                first.setdefault(number, now - started)
                if event.reason is not None:
                    whole[number], answers[number] = now - started, tuple(event.tokens)
                    if len(answers) == len(requests):
                        over.set()

        return take

    began = time.perf_counter()
    due = began
    for number, (adapter, text) in enumerate(requests):
        if rate is not None:
            due += draw.expovariate(rate)
            time.sleep(max(0.0, due - time.perf_counter()))
        how = Sampling(max_tokens=lengths[number], temperature=0)
        engine.chat(adapter, [Turn(role="user", text=text)], how, receiver(number, time.perf_counter()))
    assert over.wait(3600)
    seconds = time.perf_counter() - began
    made = [answers[number] for number in range(len(requests))]
    found = figures(made, seconds, list(first.values()), list(whole.values()))
    return {**found, "answers": made, "first_seconds": first[0]}


def closed_loop(engine: Engine, requests: list[Request], tokens: int, clients: int) -> dict[str, Any]:
    """So many clients, each of which asks its next question when the last one is answered."""
    parts = [requests[number::clients] for number in range(clients)]
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        times = [each for found in pool.map(lambda part: _client(engine, part, tokens), parts) for each in found]
    seconds = time.perf_counter() - began
    firsts, wholes, answers = (list(column) for column in zip(*times, strict=True))
    return figures(answers, seconds, firsts, wholes)


def _client(engine: Engine, requests: list[Request], tokens: int) -> list[tuple[float, float, tuple[int, ...]]]:
    return [(one["first_seconds"], one["seconds"], one["answers"][0]) for one in
            (in_batches(engine, [request], tokens, None) for request in requests)]  # fmt: skip


def on_its_thread(engine: Engine, way: Way) -> Way:
    """The way, on the thread that generates for the engine: another that computes beside it would slow both down."""

    def called() -> dict[str, Any]:
        found: list[dict[str, Any]] = []
        engine._call(lambda: found.append(way()))
        return found[0]

    return called


def one_after_another(engine: Engine, requests: list[Request], tokens: int) -> dict[str, Any]:
    """As a loop over ``zinit generate`` would, with the model loaded once."""
    models = engine._models
    whole: list[float] = []
    answers: list[tuple[int, ...]] = []
    began = time.perf_counter()
    for adapter, text in requests:
        served = models.get(adapter)
        ids, config = _prompt(engine, served, text, tokens)
        assert served.handle is not None
        with served.handle.alone():
            found = models.base.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        answers.append(tuple(found[0, ids.shape[1] :].tolist()))
        whole.append(time.perf_counter() - began)
    return {**figures(answers, time.perf_counter() - began, [], whole), "answers": answers}


def _prompt(engine: Engine, served: Any, text: str, tokens: int) -> tuple[torch.Tensor, Any]:
    prompt = served.format.prompt(Conversation(rounds=(Round(question=text),)))
    config = engine._generation(served, prompt, Sampling(max_tokens=tokens, temperature=0))
    config.eos_token_id = list(dict.fromkeys([*config.eos_token_id, *served.format.stop_tokens]))
    return torch.tensor([prompt]), config


@apart
def peft_models(options: argparse.Namespace) -> list[Any]:
    """PEFT's AdaptionPrompt of the same K and L, a model for each adapter; the gates as open as ours."""
    from peft import AdaptionPromptConfig, TaskType, get_peft_model

    made = []
    for number in range(options.adapters):
        model, _ = load_causal_lm(options.model, dtype=torch.float32)
        layers = options.layers or model.config.num_hidden_layers
        torch.manual_seed(number)
        config = AdaptionPromptConfig(
            adapter_len=options.prefix_length, adapter_layers=layers, task_type=TaskType.CAUSAL_LM
        )
        adapted = get_peft_model(model, config).eval()
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if name.endswith("adaption_gate"):
                    parameter.fill_(0.3)
        made.append(adapted)
    return made


def with_peft(engine: Engine, models: list[Any], requests: list[Request], tokens: int) -> dict[str, Any]:
    """Each model answers its requests one after the other, as `one_after_another` does."""
    whole: list[float] = []
    answers: list[tuple[int, ...]] = []
    began = time.perf_counter()
    for number, (adapter, text) in enumerate(requests):
        ids, config = _prompt(engine, engine._models.get(adapter), text, tokens)
        model = models[number % len(models)]
        with torch.no_grad():
            found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        answers.append(tuple(found[0, ids.shape[1] :].tolist()))
        whole.append(time.perf_counter() - began)
    return figures(answers, time.perf_counter() - began, [], whole)


def figures(answers: list[tuple[int, ...]], seconds: float, first: list[float], whole: list[float]) -> dict[str, Any]:
    def quantiles(values: list[float]) -> dict[str, float]:
        ordered = sorted(values)
        return {f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 4) for p in (50, 99)}

    count = sum(map(len, answers))
    found: dict[str, Any] = {
        "tokens": count,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(count / seconds, 1),
    }
    found |= {"first_token": quantiles(first)} if first else {}
    return found | {"whole": quantiles(whole)}


def main() -> None:
    options = read_options()
    torch.set_num_threads(options.threads)
    texts = [record["instruction"] for record in instructions()[0]]
    random.Random(0).shuffle(texts)
    names = [f"user{number}" for number in range(options.adapters)]
    mixed = [(names[number % len(names)], texts[number]) for number in range(options.requests)]
    limits = Limits(batch=options.requests, queue=4 * options.requests)
    engine = (Endless if options.same_lengths else Engine)(load(options, names), limits).start()
    ways = chosen_ways(options, engine, mixed)
    before = [round(load, 2) for load in os.getloadavg()]
    in_batches(engine, mixed[:8], 8, None)  # warms up
    found = measured(ways, options.rounds)
    engine.stop()
    options.model = Path(options.model).name
    kind = "-same-lengths" if options.same_lengths else ""
    options.output = options.output or RESULTS / f"serve-{options.model}{kind}-cpu.json"
    save("serve", options, {"load_before": before, **report_of(found)})


def read_options() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default=str(llama_path()), help="default: the demo's")
    options.add_argument("--requests", type=int, default=64)
    options.add_argument("--adapters", type=int, default=16)
    options.add_argument("--tuned", type=int, default=8, help="how many of them tune the host")
    options.add_argument("--prefix-length", type=int, default=10, help="K")
    options.add_argument("--layers", type=int, default=None, help="L; default: all")
    options.add_argument("--tokens", type=int, default=64, help="longest answer")
    options.add_argument("--same-lengths", action="store_true", help="answers as long as drawn; batches only")
    options.add_argument("--rate", type=float, default=20.0, help="requests a second of the Poisson process")
    options.add_argument("--clients", type=int, default=16, help="of the closed loop")
    options.add_argument("--no-peft", action="store_true", help="for bases that PEFT's AdaptionPrompt does not know")
    options.add_argument("--ways", nargs="+", help="beside the mixed batch; default: all, see the report")
    options.add_argument("--rounds", type=int, default=5, help="interleaved; medians are reported")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--output", type=Path, default=None)
    return options.parse_args(namespace=argparse.Namespace(device="cpu"))


def load(options: argparse.Namespace, names: list[str]) -> Models:
    """The base with its adapters."""
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(options, Path(folder))
        models = Models(
            str(Path(folder) / names[0]), model=options.model, template="alpaca", device=torch.device("cpu")
        )
        for name in names:
            models.add(name, str(Path(folder) / name))
    return models


def chosen_ways(options: argparse.Namespace, engine: Engine, mixed: list[Request]) -> dict[str, Way]:
    """The mixed batch, and what the options say is measured beside it."""
    tokens, wanted = options.tokens, options.ways
    ways: dict[str, Way] = {"mixed": lambda: in_batches(engine, mixed, tokens, None)}
    alone = {"one_tuned": mixed[0][0]} if options.tuned else {}
    alone |= {"one_plain": mixed[options.adapters - 1][0]} if options.tuned < options.adapters else {}
    for name, adapter in alone.items():
        ways[name] = lambda adapter=adapter: in_batches(engine, [(adapter, text) for _, text in mixed], tokens, None)
    if not options.same_lengths:
        alone_in_turn = on_its_thread(engine, lambda: one_after_another(engine, mixed, tokens))
        ways = {"one_after_another": alone_in_turn, **ways}
        ways["closed_loop"] = lambda: closed_loop(engine, mixed, tokens, options.clients)
        ways["poisson"] = lambda: in_batches(engine, mixed, tokens, options.rate)
        if not options.no_peft and (wanted is None or "peft" in wanted):
            others = peft_models(options)
            ways["peft"] = on_its_thread(engine, lambda: with_peft(engine, others, mixed, tokens))
    if unknown := set(wanted or ()) - ways.keys():
        raise SystemExit(f"there is no way {', '.join(sorted(unknown))}; choose among {', '.join(ways)}.")
    return {name: way for name, way in ways.items() if name in ("mixed", *(wanted or ways))}


def measured(ways: dict[str, Way], rounds: int) -> Found:
    """All ways, interleaved."""
    found: Found = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.process_time()  # on a machine that others use, processor seconds say more than the clock
            found[name].append(way())
            used = time.process_time() - started
            found[name][-1] |= {
                "cpu_seconds": round(used, 3),
                "tokens_per_cpu_second": round(found[name][-1]["tokens"] / used, 1),
            }
    return found


def report_of(found: Found) -> dict[str, Any]:
    """The median round of each way, and the mixed batch's ratio to every other: the median over rounds."""
    report: dict[str, Any] = {}
    if "one_after_another" in found:
        pairs = list(zip(found["mixed"][0]["answers"], found["one_after_another"][0]["answers"], strict=True))
        report["answers_equal"] = f"{sum(a == b for a, b in pairs)} of {len(pairs)}"
    for name, rounds in found.items():
        middle = sorted(rounds, key=lambda each: each["tokens_per_second"])[len(rounds) // 2]
        report[name] = {key: value for key, value in middle.items() if key not in ("answers", "first_seconds")}

    def ratio(under: str, of: str) -> float:
        pairs = zip(found["mixed"], found[under], strict=True)
        return round(statistics.median(a[of] / b[of] for a, b in pairs), 3)

    # Tokens compare ways whose answers are of other lengths; seconds, whole batches of the same requests.
    for of in ("seconds", "cpu_seconds", "tokens_per_second", "tokens_per_cpu_second"):
        report[f"mixed_over: {of}"] = {name: ratio(name, of) for name in found if name != "mixed"}
    return report


if __name__ == "__main__":
    main()
