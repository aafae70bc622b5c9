"""The paper's figures for RoBERTa-large stand where its data sets are named, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from zinit.bench.cells import Cell
from zinit.bench.summary import dataset_of
from zinit.tasks.ner.task import TokenClassification
from zinit.tasks.squad.task import Squad

FACTS = Path(__file__).parents[3] / "shared" / "reference" / "paper-facts.md"
ROWS = {"Full": "full", "Prompt tuning": "prompt-tuning", "P-tuning v2": "prefix-tuning", "**Zero-init**": "zero-init"}


def tables() -> list[dict[str, list[float]]]:
    """The tables of section 5.5 of the facts: {row: figures}."""
    section = FACTS.read_text().split("### 5.5 ")[1].split("### 5.6 ")[0]
    found: list[dict[str, list[float]]] = []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "Method":
            found.append({})
        elif found and len(cells) > 2 and cells[1][:1].isdigit():
            found[-1][cells[0].replace(" (as published)", "")] = [float(cell) for cell in cells[1:]]
    return found


@pytest.mark.skipif(not FACTS.is_file(), reason="../shared is absent")
@pytest.mark.parametrize("row", sorted(ROWS))
def test_the_figures_are_the_papers(row: str) -> None:
    squad, entities = (table[row] for table in tables())
    sets, metrics = ("squad", "squad_v2"), ("exact_match", "f1")
    assert [Squad.paper_figure(ROWS[row], data, metric) for data in sets for metric in metrics] == squad
    found = [TokenClassification.paper_figure(ROWS[row], data, "f1") for data in ("conll2003", "conll04")]
    assert found == entities[:2]


@pytest.mark.parametrize(
    ("method", "dataset", "metric"),
    [("lora", "squad", "f1"), ("zero-init", "", "f1"), ("zero-init", "xquad.en.json", "f1"), ("full", "squad", "loss")],
)
def test_nothing_where_the_paper_says_nothing(method: str, dataset: str, metric: str) -> None:
    assert Squad.paper_figure(method, dataset, metric) is None


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, ""),
        ({"data": "rajpurkar/squad_v2"}, "squad_v2"),
        ({"data": "/data/vtab", "vary": {"task.dataset": "cifar"}}, "cifar"),
        ({"data": "/data/a", "vary": {"data": "/data/caltech101"}}, "caltech101"),
    ],
)
def test_the_data_set_of_a_cell(changes: dict, name: str) -> None:
    cell = Cell(experiment="e", backbone="roberta", task="squad", method="zero-init", seed=0, **changes)
    assert dataset_of(cell) == name
