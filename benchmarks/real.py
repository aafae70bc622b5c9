"""Really pretrained models: every method at rates chosen on a validation part, five seeds, paired intervals.

    python -m benchmarks.real --models DIR --data DIR [--only "MiniLM: named entities"] [--budget MINUTES]

``--models`` holds minilm_l6, dinov2_small, gemma3_270m and qwen_coder, ``--data`` wnut17, sign_digits, alpaca, squad,
mnist_pngs and caltech101, or what the experiments of ``--only`` need; docs/real-weights.md says where both are from.
Finished cells are in ``benchmarks/results/real/cells``: the same command goes on from there.
``--page`` writes the tables into docs/real-weights.md, and a short one into the README, from what is finished, without
models and data.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from zinit.bench.cells import Experiment
from zinit.bench.plan import REFERENCE, Benchmark, make_benchmark
from zinit.bench.runner import Event, Runner, read_cells, score
from zinit.bench.summary import Row, summarise, table

OUTPUT = RESULTS / "real"
PLAN = Path(__file__).with_suffix(".toml")
README = Path(__file__).parents[1] / "README.md"
PAGE = README.parent / "docs" / "real-weights.md"
TABLES = "<!-- tables: python -m benchmarks.real --page -->"
END = "<!-- end of the tables -->"
WEIGHTS = "model.safetensors"
COLUMNS = (
    *(
        "method",
        "mean",
        "std",
        "minus zero-init",
        "loss",
        "loss minus zero-init",
        "forgetting",
        "rate",
        "trials",
        "trainable",
    ),
    *("seeds", "samples"),
)
DIFFERENCES = ("method", "minus zero-init", "loss minus zero-init", "trainable", "seeds")
# Members of the family, the best of which is compared with the others a second time.
FAMILY = (
    *("zero-init", "zero-init-own", "query-gate", "query-gate-own", "hyper-prompts"),
    *("gated-prefix-tuning", "gated-prefix-tuning-fast", "gated-prefix-tuning-own"),
    *("zero-init-tuned", "query-gate-tuned"),
)
HOST_UNTOUCHED = FAMILY[:8]  # and so is the best of those that leave the host as it is
SHORT = (
    *("method", "mean", "minus zero-init", "loss", "loss minus zero-init", "forgetting", "rate", "trainable", "seeds"),
    "samples",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", action="append", default=[], help="name of an experiment; repeatable")
    parser.add_argument("--method", action="append", default=[], help="repeatable")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--budget", type=float, help="minutes after which no further run starts")
    parser.add_argument("--page", action="store_true", help="write the tables into the page and stop")
    options = parser.parse_args()
    benchmark = make_benchmark(config_file=str(PLAN))
    if options.page:
        write_page(benchmark)
        return
    if options.models is None or options.data is None:
        parser.error("name the folders: --models DIR --data DIR")
    kept = [narrowed(e, options.method) for e in benchmark.experiments if e.name in (options.only or [e.name])]
    note_models(options.models)
    places = places_of(options.models, options.data, kept)
    runner = Runner(
        replace(benchmark, experiments=tuple(kept)),
        OUTPUT,
        jobs=options.jobs,
        budget=None if options.budget is None else 60 * options.budget,
        on_event=report,
        places=places,
    )
    runner.run()
    write_page(benchmark)


def narrowed(experiment: Experiment, methods: list[str]) -> Experiment:
    """The experiment by some of its methods; all if none is named."""
    return replace(experiment, methods=tuple(m for m in experiment.methods if m in (methods or [m])))


def report(event: Event) -> None:
    """A line for each finished cell; what its run left is removed, as weights of whole models are among it."""
    if event["event"] != "cell":
        return
    found = event["error"] if event["status"] != "done" else event["metrics"]["adapted"]
    print(f"{event['status']} {event['id']} ({event['wall_seconds']:.0f} s) {found}", flush=True)
    shutil.rmtree(OUTPUT / "runs" / event["id"], ignore_errors=True)


# --- the data: parts that are the same on every machine ---


def places_of(models: Path, data: Path, experiments: Sequence[Experiment]) -> dict[str, str]:
    """Where everything is on this machine, the parts of the data made; see `zinit.bench.cells.Cell.at`."""
    parts = Path(tempfile.gettempdir()) / "zinit-real-parts"
    said = " ".join(text for e in experiments for text in (str(e.data), *e.options, *e.select.options))
    make_parts(data, parts, [name for name in PARTS if f"{{parts}}/{name}" in said])
    return {"models": str(models.absolute()), "parts": str(parts), "data": str(data.absolute())}


def make_parts(data: Path, parts: Path, names: Sequence[str]) -> None:
    """Training, validation and test parts of these data, each made once."""
    parts.mkdir(exist_ok=True)
    for name in names:
        source, make, sizes = PARTS[name]
        if (parts / name).is_dir():
            continue
        if not (data / source).is_dir():
            raise SystemExit(f"{data / source} is not there: docs/real-weights.md says where {source} is from.")
        with tempfile.TemporaryDirectory(dir=parts) as folder:
            made = Path(folder) / name
            made.mkdir()
            make(data / source, made, sizes)
            made.rename(parts / name)


def sentences(source: Path, target: Path, sizes: tuple[int, ...]) -> None:
    """Two parts of the training sentences, drawn once, and the first of the development part, which are reported."""

    def read(name: str) -> list[str]:
        return [block for block in re.split(r"\n\s*\n", (source / name).read_text("utf-8")) if block.strip()]

    parts = [*drawn(read("wnut17train.conll"), sizes[:2]), read("dev_first600.conll")[: sizes[2]]]
    for name, part in zip(("train", "validation", "test"), parts, strict=True):
        (target / f"{name}.conll").write_text("\n\n".join(part) + "\n", "utf-8")


def pictures(source: Path, target: Path, sizes: tuple[int, ...]) -> None:
    """So many of each class, which are folders."""
    for folder in sorted(source.iterdir()):
        for name, part in zip(("train", "val", "test"), drawn(sorted(folder.iterdir()), sizes), strict=True):
            (target / name / folder.name).mkdir(parents=True)
            for picture in part:
                shutil.copyfile(picture, target / name / folder.name / picture.name)


def instructions(source: Path, target: Path, sizes: tuple[int, ...]) -> None:
    """Of the 5,000, those with an output."""
    records = [record for record in json.loads((source / "alpaca_5000.json").read_text("utf-8")) if record["output"]]
    for name, part in zip(("train", "validation", "test"), drawn(records, sizes), strict=True):
        (target / f"{name}.json").write_text(json.dumps(part, ensure_ascii=False), "utf-8")


def paragraphs(source: Path, target: Path, sizes: tuple[int, ...]) -> None:
    """English paragraphs of XQuAD: text of the kind that language models were trained on."""
    articles = json.loads((source / "xquad.en.json").read_text("utf-8"))["data"]
    texts = [" ".join(paragraph["context"].split()) for article in articles for paragraph in article["paragraphs"]]
    [part] = drawn(texts, sizes)
    (target / "paragraphs.txt").write_text("\n\n".join(part) + "\n", "utf-8")


def questions(source: Path, target: Path, sizes: tuple[int, ...]) -> None:
    """So many of XQuAD's English articles with their questions, in SQuAD's form."""
    document = json.loads((source / "xquad.en.json").read_text("utf-8"))
    for name, part in zip(("train", "validation", "test"), drawn(document["data"], sizes), strict=True):
        (target / f"{name}.json").write_text(json.dumps({**document, "data": part}, ensure_ascii=False), "utf-8")


# The parts, by name: the folder of --data that they are from, what makes them, and how large they are.
PARTS: dict[str, tuple[str, Callable[[Path, Path, tuple[int, ...]], None], tuple[int, ...]]] = {
    "wnut17": ("wnut17", sentences, (400, 200, 400)),
    "sign_digits": ("sign_digits/Dataset", pictures, (8, 4, 12)),
    "mnist": ("mnist_pngs/train", pictures, (8, 4, 12)),
    "caltech101": ("caltech101/101_ObjectCategories", pictures, (4, 2, 2)),
    "alpaca": ("alpaca", instructions, (64, 32, 48)),
    "squad": ("squad", paragraphs, (8,)),
    "questions": ("squad", questions, (16, 6, 10)),
}


def drawn(things: list[Any], sizes: tuple[int, ...]) -> list[list[Any]]:
    """Parts of these sizes, drawn without replacement, each in the source's order."""
    order = random.Random(0).sample(range(len(things)), sum(sizes))
    ends = list(itertools.accumulate(sizes, initial=0))
    return [[things[index] for index in sorted(order[a:b])] for a, b in itertools.pairwise(ends)]


# --- what is shown ---


def note_models(models: Path) -> None:
    """Writes which weights were measured, beside the cells; refuses others than those of the cells that are there."""
    path, found = RESULTS / "real-models.json", {}
    for folder in sorted(path for path in models.iterdir() if (path / WEIGHTS).is_file()):
        found[folder.name] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    known = json.loads(path.read_text()) if path.is_file() else {}
    if other := [name for name in found.keys() & known.keys() if found[name] != known[name]]:
        raise SystemExit(f"{other[0]} is not the model that was measured before (sha256 {known[other[0]]}).")
    path.write_text(json.dumps(known | found, indent=2) + "\n")


def write_page(benchmark: Benchmark) -> None:
    """Puts the tables into the page, and what has run into the README: between the lines `TABLES` and `END`."""
    rows, whole, short = summarise(benchmark, OUTPUT), [], []
    for experiment in benchmark.experiments:
        own = [row for row in rows if row.experiment == experiment.name]
        title = [f"### {experiment.name} ({own[0].metric})", f"{experiment.note}."]
        ran = [row for row in own if row.values]
        whole += [*title, as_markdown(own, COLUMNS) if ran else "Nothing of it has run yet."]
        whole += [f"* {row.method}: not possible here: {row.problem}" for row in own if row.problem]
        short += [*title, as_markdown(ran, SHORT)] if ran else []
        scores = {name: best for name, best in tried(experiment).items() if name in {row.method for row in ran}}
        for members in (FAMILY, HOST_UNTOUCHED):
            there = [name for name in members if name in scores]
            best = max(there, key=lambda name: scores[name], default=REFERENCE)
            if best != REFERENCE and f"Differences from {best}," not in "".join(whole[whole.index(title[0]) :]):
                whole += [
                    f"Differences from {best}, the best on the validation part of {', '.join(there)}:",
                    as_markdown(differences(benchmark, experiment, best), DIFFERENCES, reference=best),
                ]
    for page, parts in ((PAGE, whole), (README, short)):
        text = page.read_text("utf-8")
        before, after = text[: text.index(TABLES) + len(TABLES)], text[text.index(END) :]
        page.write_text("\n\n".join([before, *parts, after]), "utf-8")


def tried(experiment: Experiment) -> dict[str, float]:
    """The best score on the validation part by member of `FAMILY`; of those that have all of their trials."""
    finished = {cell["id"]: cell for cell in read_cells(OUTPUT)}
    cells = {name: [cell for cell in experiment.selection_cells() if cell.name == name] for name in FAMILY}
    return {
        name: max(score(experiment, finished[cell.id]) for cell in own)
        for name, own in cells.items()
        if own and all(cell.id in finished for cell in own)
    }


def differences(benchmark: Benchmark, experiment: Experiment, reference: str) -> list[Row]:
    """The rows of the methods that have run, compared with one of them."""
    rows = summarise(replace(benchmark, experiments=(experiment,)), OUTPUT, reference)
    return [row for row in rows if row.values and row.method != reference]


def as_markdown(rows: list[Row], columns: Sequence[str], reference: str = REFERENCE) -> str:
    """A table of some of the columns."""
    header, lines = table(rows)
    header = [name.replace(f"minus {REFERENCE}", f"minus {reference}") for name in header]
    columns = [name.replace(f"minus {REFERENCE}", f"minus {reference}") for name in columns]
    kept = [header.index(name) for name in columns if name in header]
    cells = [[header[place] for place in kept], ["---"] * len(kept)]
    cells += [[line[place] for place in kept] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


if __name__ == "__main__":
    main()
