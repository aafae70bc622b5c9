"""VTAB-1k: nineteen tasks as one figure, the paper's rows, presets and settings."""

from __future__ import annotations

from typing import Any

import pytest

from tests.shared import SHARED
from zinit.errors import ConfigError, DataError
from zinit.runs.config import RunConfig
from zinit.runs.presets import list_presets, read_preset
from zinit.tasks.vtab.task import VTAB_TASKS, VTABConfig, paper_results, summarise, vpt_grid

PRINTED = {  # the paper's group means (Table 6), and two means of ours from the unrounded rows
    "Full": (75.88, 83.36, 47.64, 68.97, 65.57),
    "Bias": (73.3, 78.3, 44.1, 65.22, 62.05),
    "Adapter": (70.39, 77.11, 33.43, 60.31, 56.24),
    "Sidetune": (58.21, 68.12, 23.41, 49.91, 45.65),
    "VPT": (78.48, 82.43, 54.98, 71.97, 69.42),
    "Zero-init": (81.74, 84.43, 56.75, 74.32, 71.80),
}


@pytest.mark.parametrize("method", PRINTED)
def test_the_papers_means_follow_from_its_rows(method: str) -> None:
    summary = summarise(paper_results()[method])
    natural, specialized, structured, of_groups, of_tasks = PRINTED[method]
    found = (*summary.groups.values(), summary.mean_of_groups, summary.mean_of_tasks)
    assert list(summary.groups) == ["Natural", "Specialized", "Structured"]
    # Rows are rounded to 0.1, so a mean of them is off by at most 0.05; the figures printed are rounded once more.
    for value, printed in zip(found, (natural, specialized, structured, of_groups, of_tasks), strict=True):
        assert value == pytest.approx(printed, abs=0.05 + (0.05 if method == "Bias" else 0.005))
    assert not summary.partial
    assert list(summary.to_dict())[-2:] == ["mean of 3 group means", "mean of 19 tasks"]


def test_partial_results_say_so() -> None:
    summary = summarise({"cifar": 0.5, "dtd": 0.7, "kitti": 0.8})
    assert summary.groups == {"Natural": pytest.approx(0.6), "Structured": pytest.approx(0.8)}
    assert summary.mean_of_groups is None
    assert summary.mean_of_tasks == pytest.approx(2.0 / 3)
    assert summary.partial
    assert len(summary.missing) == 16
    assert "svhn" in summary.missing
    assert "mean of 3 tasks (partial)" in summary.to_dict()
    assert summary.to_dict()["missing"] == list(summary.missing)
    with pytest.raises(DataError, match=r"'cifar10' is no task of VTAB-1k\. Did you mean 'cifar'"):
        summarise({"cifar10": 0.5})
    with pytest.raises(DataError, match="no result"):
        summarise({})


def facts(start: str, end: str) -> list[list[str]]:
    """The rows of the tables between two texts of the fact sheet."""
    text = (SHARED / "reference" / "paper-facts.md").read_text(encoding="utf-8")
    part = text.split(start)[1].split(end)[0]
    return [[cell.strip(" *") for cell in row.strip("|").split("|")] for row in part.splitlines() if row[:1] == "|"]


@pytest.mark.skipif(not (SHARED / "reference").is_dir(), reason="needs the fact sheet in ../shared/reference")
def test_the_tables_are_those_of_the_fact_sheet() -> None:
    groups = facts("#### 6.1.1", "#### 6.1.2")[2:]
    assert [(row[1], row[0], int(row[2])) for row in groups] == [
        (name, known.group, known.classes) for name, known in VTAB_TASKS.items()
    ]
    for row, known in zip(groups, VTAB_TASKS.values(), strict=True):
        assert f"{known.test_images:,}" in row[3]
    rows: dict[str, list[float]] = {name: [] for name in paper_results()}
    for row in facts("\nNatural:", "Zero-init beats VPT"):
        if row[0] in rows:
            rows[row[0]] += map(float, row[1:-1])  # the last cell is the group's mean
    assert rows == {method: list(results.values()) for method, results in paper_results().items()}
    assert rows.keys() == PRINTED.keys()


def test_presets_are_complete_and_the_grid_is_vpts() -> None:
    names = [name for name in list_presets() if name.startswith("vtab/")]
    assert names == ["vtab/demo", "vtab/fact", "vtab/vpt"]
    for name in names:
        preset = read_preset(name)
        assert preset.pop("description")
        config = RunConfig.from_dict(preset)
        assert isinstance(config.options, VTABConfig)
        assert RunConfig.from_dict(config.to_dict()) == config
    assert vpt_grid()["base_rate"] == [50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05]
    assert vpt_grid()["weight_decay"] == [0.01, 0.001, 0.0001, 0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"split": "val"}, "split must be one of 'train800val200', 'train800'"),
        ({"on_bad": "ignore"}, "on_bad must be one of"),
        ({"interpolation": "nearest"}, "interpolation must be one of"),
        ({"image_size": 0}, "image_size must be a whole number"),
        ({"drop_path": 1.0}, "drop_path must be a rate"),
        ({"fields": ("image",)}, "fields must be a list of two names: the columns of image and label"),
        ({"dataset": 3}, "dataset must be text"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        VTABConfig.from_dict(settings)
