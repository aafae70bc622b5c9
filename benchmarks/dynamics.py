"""How zero-init attention learns on really pretrained models: what opens when, which lever helps, what harm is done.

    python -m benchmarks.dynamics --models DIR --data DIR [--only "MiniLM: named entities"] [--steps 20]

The models, data and starting rates of benchmarks/real.toml; losses are of its validation parts. One seed and short
runs: what is found here is a reason to try something, not a result. Writes ``benchmarks/results/dynamics.json``, after
every run, and the tables of docs/dynamics.md; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from benchmarks.common import RESULTS
from benchmarks.real import PLAN, places_of
from zinit.adapter.handle import Handle
from zinit.bench.cells import Experiment
from zinit.bench.plan import make_benchmark
from zinit.bench.summary import FORGETTING, show
from zinit.prefix import PromptTable, ZeroGatedPrefix
from zinit.runs.train import Run, build
from zinit.train.batches import load_batches
from zinit.train.callbacks import Callback, Progress
from zinit.train.events import Step
from zinit.train.held_out import held_out_loss
from zinit.train.loop import Stepper, ignore, run_steps
from zinit.train.plan import Plan
from zinit.train.strategy import place

OUTPUT = RESULTS / "dynamics.json"
PAGE = Path(__file__).parents[1] / "docs" / "dynamics.md"
TABLES = "<!-- tables: python -m benchmarks.dynamics -->"
MATTERS = 0.1  # of the gates' gradient: from there on prompts learn too
BATCH = ("train.batch_size=8", "train.micro_batch_size=8")
THIRD = "prefix.layers={third}"
OWN = ("prefix.parametrization=key_value", "prefix.init_std=0.02")
PROJECTED = "prefix.parametrization=prompt"


class Lever(NamedTuple):
    """One thing that is changed.

    Attributes:
        method: registered name.
        options: of the run.
        start: what prompts start at where it is no draw: what the attention of their own layer ("own"), or of the
            lowest one ("lowest"), sees of a training example.
    """

    method: str = "zero-init"
    options: tuple[str, ...] = ()
    start: str = ""


LEVERS: dict[str, Lever] = {
    "as it is": Lever(),
    "gates x1": Lever(options=("train.rates.gates=1",)),
    "gates x10": Lever(options=("train.rates.gates=10",)),
    "gates x30": Lever(options=("train.rates.gates=30",)),
    "gates x100": Lever(options=("train.rates.gates=100",)),
    "gates without tanh": Lever(options=("prefix.gate=identity",)),
    "gates start at N(0, 1)": Lever("random-gate"),
    "a gate for each query": Lever("query-gate"),
    "keys and values of their own, N(0, 0.02²)": Lever(options=OWN),
    "their own, and gates x10": Lever(options=(*OWN, "train.rates.gates=10")),
    "their own, and a gate for each query": Lever("query-gate", OWN),
    "in one softmax with the words": Lever("gated-prefix-tuning"),
    "their own, gates x10, in one softmax": Lever("gated-prefix-tuning", (*OWN, "train.rates.gates=10")),
    "their own, in one softmax, all at 0.09": Lever(
        "gated-prefix-tuning", (*OWN, "train.learning_rate=9e-2", "train.rates.gates=1")
    ),
    "their own, in one softmax, without gates": Lever("prefix-tuning", OWN),
    "their own, without gates": Lever(options=(*OWN, "prefix.gating=false")),
    "prompts N(0, 1)": Lever(options=("prefix.init_std=1",)),
    "prompts through the projections, N(0, 0.02²)": Lever(options=(PROJECTED, "prefix.init_std=0.02")),
    "prompts through the projections, N(0, 1)": Lever(options=(PROJECTED, "prefix.init_std=1")),
    "prompts start as what their layer sees": Lever(options=(PROJECTED,), start="own"),
    "prompts start as what the lowest layer sees": Lever(options=(PROJECTED,), start="lowest"),
    "prompts by a network": Lever("hyper-prompts", (PROJECTED, "prefix.init_std=1")),
    "K = 2": Lever(options=("prefix.length=2",)),
    "K = 32": Lever(options=("prefix.length=32",)),
    "topmost third": Lever(options=(THIRD,)),
    "no warm-up": Lever(options=("train.warmup_steps=0",)),
    "weight decay 0.02": Lever(options=("train.weight_decay=0.02",)),
}
# Before any training: {name: options}, each with random gates and as a plain prefix.
STARTS: dict[str, tuple[str, ...]] = {
    "N(0, 0.02²)": ("prefix.parametrization=prompt", "prefix.init_std=0.02"),
    "N(0, 1)": ("prefix.parametrization=prompt", "prefix.init_std=1"),
    "N(0, 1), K = 2": ("prefix.parametrization=prompt", "prefix.init_std=1", "prefix.length=2"),
    "N(0, 1), K = 32": ("prefix.parametrization=prompt", "prefix.init_std=1", "prefix.length=32"),
    "N(0, 1), topmost third": ("prefix.parametrization=prompt", "prefix.init_std=1", THIRD),
}
UNTRAINED = ("zero-init", "random-gate", "prefix-tuning")
SHOWN = ("loss", "forgetting", "prompts learn from step", *UNTRAINED)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", action="append", default=[], help="name of an experiment; repeatable")
    parser.add_argument("--lever", action="append", default=[], help="what to change; repeatable; without it all")
    parser.add_argument("--starts", action="store_true", help="the harm before training alone")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    kept = [e for e in make_benchmark(config_file=str(PLAN)).experiments if e.name in (options.only or [e.name])]
    places = places_of(options.models, options.data, kept)
    found: dict[str, Any] = json.loads(OUTPUT.read_text()) if OUTPUT.is_file() else {}
    starts = STARTS if options.starts or not options.lever else ()
    levers = options.lever or (() if options.starts else LEVERS)
    for experiment in kept:
        measure(Host(experiment, places, options.steps), starts, levers, found)
    write_page(found)


def measure(host: Host, starts: Collection[str], levers: Collection[str], found: dict[str, Any]) -> None:
    """Everything that ``found`` does not hold yet of a host; runs of another length are made anew.

    Args:
        host: and its task.
        starts: of `STARTS`.
        levers: of `LEVERS`.
        found: by experiment; completed here, and written.
    """
    name = host.experiment.name
    own = found.setdefault(name, {"steps": host.steps, "starts": {}, "levers": {}})
    if own["steps"] != host.steps:
        own |= {"steps": host.steps, "levers": {}}
    for kind, names, look in (("starts", starts, host.start), ("levers", levers, host.lever)):
        for each in names:
            if each not in own[kind]:
                own[kind][each] = look(each)
                print(name, each, {key: own[kind][each][key] for key in SHOWN if key in own[kind][each]}, flush=True)
                OUTPUT.write_text(json.dumps(found, allow_nan=False, indent=1) + "\n")


class Host:
    """A pretrained model with its task, as an experiment has them.

    Args:
        experiment: of benchmarks/real.toml.
        places: see `zinit.bench.cells.Cell.at`.
        steps: of a short run.
    """

    def __init__(self, experiment: Experiment, places: dict[str, str], steps: int) -> None:
        self.experiment, self.places, self.steps = experiment, places, steps
        handle = self.run("zero-init", ()).task.handle
        assert handle is not None
        self.layers = len(handle.sites)

    def run(self, method: str, options: Sequence[str]) -> Run:
        """A run that nothing is trained in yet and that writes nothing."""
        experiment = self.experiment
        rates = [option for option in experiment.method_options["zero-init"] if option.startswith("train.")]
        cell = replace(experiment, methods=(method,), method_options={method: rates}, seeds=(0,)).cells()
        short = (f"train.steps={self.steps}", f"train.warmup_steps={self.steps // 5}", *BATCH)
        said = (*of_trials(experiment), *short, *(self._filled(option) for option in options))
        first = next(iter(cell))
        config = replace(first, options=(*first.options, *said)).at(self.places).resolve()
        run = build(config, Path(), preset=None, resume=False, on_event=ignore)
        place(run.task, run.accelerator)
        with run.built.adapted.disabled():
            run.task.prepare()
        return run

    def _filled(self, option: str) -> str:
        return option.format(third=max(1, self.layers // 3)) if "{" in option else option

    def start(self, name: str) -> dict[str, float]:
        """Harm before any training: how far features moved, or how much the loss on known texts rose."""
        found = {}
        for method in UNTRAINED:
            run = self.run(method, STARTS[name])
            with run.built.adapted.disabled():
                before = forgetting(run)
            found[method] = forgetting(run) - before
        return found

    def lever(self, name: str) -> dict[str, Any]:
        """A short run with one thing changed."""
        lever = LEVERS[name]
        run = self.run(lever.method, lever.options)
        with run.built.adapted.disabled():
            before = forgetting(run)
        if lever.start:
            start_at_words(run, lever.start)
        watch = Watch(run)
        stepper = Stepper(run.task, Plan.of(run.task, run.config.train, 0), run.accelerator)
        watch.follow(stepper.optimizer.optimizer)
        batches = load_batches(stepper.plan, run.task.collate, run.accelerator, start=0)
        run_steps(stepper, batches, [watch], start=0)
        found = watch.summary()
        loss, _ = held_out_loss(run.task, run.config.train, run.accelerator)
        return {"loss": loss, "forgetting": forgetting(run) - before, **found}


def of_trials(experiment: Experiment) -> list[str]:
    """The options of the runs that choose rates; but what is forgotten is measured, which trials may leave out."""
    return [option for option in experiment.select.options if not option.startswith("task.known_texts=")]


def forgetting(run: Run) -> float:
    """How far features of held-out examples have moved, or the loss on known texts."""
    metrics = run.task.evaluate(run.accelerator).metrics  # of language models no answers, as the plan says
    return next(metrics[name] for name in FORGETTING if name in metrics)


@torch.no_grad()
def start_at_words(run: Run, layer: str) -> None:
    """Prompts become what attention sees at K places, drawn with seed 0, of the longest training example.

    Args:
        run: nothing is trained in yet.
        layer: see `Lever`.
    """
    task, handle, seen = run.task, run.task.handle, {}
    assert handle is not None

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen[name] = (given[0] if given else named["hidden_states"]).flatten(0, -2)  # (T, C)

        return hook

    longest = max(range(len(task.train_stream)), key=lambda index: task.train_stream.lengths[index])
    with ExitStack() as hooks, handle.disabled():
        for site in handle.sites:
            hooked = site.module.register_forward_pre_hook(note(site.name), with_kwargs=True)
            hooks.callback(hooked.remove)
        task(send_to_device(task.collate(task.train_stream, [longest]), run.accelerator.device))
    for name, prefix in handle.prefixes.items():
        shown = seen[name if layer == "own" else handle.sites[0].name]
        places = torch.randperm(len(shown), generator=torch.Generator().manual_seed(0))[: prefix.config.length]
        assert isinstance(prefix.prompt, PromptTable)
        prefix.prompt.weight.copy_(shown[places])


class Watch(Callback):
    """Notes gates, gradients by role and where prompts are attended to, step by step.

    Args:
        run: whose adapter is watched.
    """

    def __init__(self, run: Run) -> None:
        assert run.task.handle is not None
        self.handle: Handle = run.task.handle
        self.gates: list[float] = []
        self.losses: list[float] = []
        self.gradients: list[dict[str, float]] = []
        self.spread: list[float] = []  # of this step: entropy of the attention to prompts, 1 where it is even
        self.spreads: list[float | None] = []  # None in one softmax with the words, whose attention is the host's own
        for prefix in self.handle.prefixes.values():
            prefix.register_forward_hook(self._attended)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are noted before each update, clipped as it takes them."""
        optimizer.register_step_pre_hook(lambda *_: self.gradients.append(self._norms()))

    def _norms(self) -> dict[str, float]:
        return {role: norm([p.grad for p in own]) for role, own in self.handle.roles().items()}

    def _attended(self, prefix: ZeroGatedPrefix, given: tuple[Any, ...], _: Tensor) -> None:
        query, key, _, scale = given
        with torch.no_grad():
            weights = (query @ key.to(query.dtype).transpose(-1, -2) * scale).float().softmax(-1)
            entropy = -(weights * weights.clamp_min(1e-12).log()).sum(-1).mean().item()
        self.spread.append(entropy / math.log(key.shape[2]))

    def on_step(self, progress: Progress, step: Step) -> None:
        gates = torch.cat([gates.detach().abs().flatten() for gates in self.handle.gates().values()])
        self.gates.append(gates.mean().item())
        self.losses.append(step.loss)
        self.spreads.append(round(sum(self.spread) / len(self.spread), 4) if self.spread else None)
        self.spread.clear()

    def summary(self) -> dict[str, Any]:
        """What is kept of a run."""
        ratios = [found["prompts"] / found["gates"] if found.get("gates") else math.inf for found in self.gradients]
        matters = next((step + 1 for step, ratio in enumerate(ratios) if ratio >= MATTERS), None)
        return {
            "prompts learn from step": matters,
            "mean gate": self.gates[-1],
            "spread": [self.spreads[0], self.spreads[-1]],
            "gradient of prompts / gates": " ".join(f"{ratio:.2g}" for ratio in ratios),
            "training loss": " ".join(f"{loss:.3f}" for loss in self.losses),
        }


def norm(gradients: list[Tensor | None]) -> float:
    """Of all of them together; parameters without one count as zero."""
    return math.sqrt(sum(g.double().pow(2).sum().item() for g in gradients if g is not None))


# --- the page ---


def write_page(found: dict[str, Any]) -> None:
    """Puts the tables into the page, behind the line `TABLES`."""
    parts = []
    for name, host in found.items():
        parts.append(f"### {name}")
        if host["starts"]:
            parts.append(f"Harm before any training:\n\n{_starts(host['starts'])}")
        parts.append(f"After {host['steps']} steps, one seed:\n\n{_levers(host['levers'])}")
    head = PAGE.read_text("utf-8").partition(TABLES)[0] + TABLES
    PAGE.write_text("\n\n".join([head, *parts]) + "\n", "utf-8")


def _starts(found: dict[str, dict[str, float]]) -> str:
    cells = [[name, *(f"{own[method]:.4f}" for method in UNTRAINED)] for name, own in found.items()]
    return _table(["prompts", *UNTRAINED], cells)


def _levers(found: dict[str, dict[str, Any]]) -> str:
    cells = [
        [
            name,
            show(own["loss"], 4),
            show(own["forgetting"], 4),
            str(own["prompts learn from step"] or "-"),
            show(own["mean gate"]),
            ", ".join("-" if spread is None else f"{spread:.2f}" for spread in own["spread"]),
        ]
        for name, own in found.items()
    ]
    return _table(["lever", *SHOWN[:3], "mean gate, last", "spread, first and last"], cells)


def _table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines])


if __name__ == "__main__":
    main()
