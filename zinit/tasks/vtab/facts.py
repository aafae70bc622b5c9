"""What VTAB-1k is: 19 tasks in three groups, and how 19 accuracies become one figure."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

from zinit.errors import DataError
from zinit.registry import did_you_mean


class VTABTask(NamedTuple):
    """One of the 19.

    Attributes:
        group: Natural, Specialized or Structured.
        classes: how many there are.
        test_images: size of the test part; about so many where it depends on the dump (Caltech 101).
    """

    group: str
    classes: int
    test_images: int


VTAB_TASKS = {
    "cifar": VTABTask("Natural", 100, 10_000),
    "caltech101": VTABTask("Natural", 102, 6_084),
    "dtd": VTABTask("Natural", 47, 1_880),
    "oxford_flowers102": VTABTask("Natural", 102, 6_149),
    "oxford_iiit_pet": VTABTask("Natural", 37, 3_669),
    "svhn": VTABTask("Natural", 10, 26_032),
    "sun397": VTABTask("Natural", 397, 21_750),
    "patch_camelyon": VTABTask("Specialized", 2, 32_768),
    "eurosat": VTABTask("Specialized", 10, 5_400),
    "resisc45": VTABTask("Specialized", 45, 6_300),
    "diabetic_retinopathy": VTABTask("Specialized", 5, 42_670),
    "clevr_count": VTABTask("Structured", 8, 15_000),
    "clevr_dist": VTABTask("Structured", 6, 15_000),
    "dmlab": VTABTask("Structured", 6, 22_735),
    "kitti": VTABTask("Structured", 4, 711),
    "dsprites_loc": VTABTask("Structured", 16, 73_728),
    "dsprites_ori": VTABTask("Structured", 16, 73_728),
    "smallnorb_azi": VTABTask("Structured", 18, 12_150),
    "smallnorb_ele": VTABTask("Structured", 9, 12_150),
}
GROUPS = ("Natural", "Specialized", "Structured")


@dataclass(frozen=True, kw_only=True)
class VTABSummary:
    """The three ways in use to report VTAB-1k, in the unit of what was summarised.

    Attributes:
        groups: mean of each group that has a result (what the paper reports).
        mean_of_groups: mean of the three group means, the usual single figure; None where a group has no result.
        mean_of_tasks: mean over all tasks at once, VTAB's own figure.
        missing: tasks without a result. With any missing every figure is partial, and comparable to nothing.
    """

    groups: dict[str, float]
    mean_of_groups: float | None
    mean_of_tasks: float
    missing: tuple[str, ...]

    @property
    def partial(self) -> bool:
        """Whether a task is missing."""
        return bool(self.missing)

    def to_dict(self) -> dict[str, Any]:
        """Every figure under a name that says what it is."""
        count = len(VTAB_TASKS) - len(self.missing)
        figures: dict[str, Any] = {f"mean of {group}": mean for group, mean in self.groups.items()}
        figures["mean of 3 group means"] = self.mean_of_groups
        figures[f"mean of {count} tasks"] = self.mean_of_tasks
        if self.partial:
            figures = {f"{name} (partial)": figure for name, figure in figures.items()}
            figures["missing"] = list(self.missing)
        return figures


def summarise(results: Mapping[str, float]) -> VTABSummary:
    """Group means, their mean, and the mean over all tasks.

    Args:
        results: task directory to top-1 accuracy, all in one unit; any of the 19 may be missing.

    Raises:
        DataError: if there are none, or a task is not of VTAB-1k.
    """
    for name in results:
        if name not in VTAB_TASKS:
            raise DataError(f"{name!r} is no task of VTAB-1k.{did_you_mean(name, VTAB_TASKS)}")
    if not results:
        raise DataError("there is no result of VTAB-1k to summarise.")
    groups: dict[str, float] = {}
    for group in GROUPS:
        found = [value for name, value in results.items() if VTAB_TASKS[name].group == group]
        if found:
            groups[group] = sum(found) / len(found)
    return VTABSummary(
        groups=groups,
        mean_of_groups=sum(groups.values()) / len(GROUPS) if len(groups) == len(GROUPS) else None,
        mean_of_tasks=sum(results.values()) / len(results),
        missing=tuple(name for name in VTAB_TASKS if name not in results),
    )


def paper_results() -> dict[str, dict[str, float]]:
    """{method: {task: top-1 accuracy in %}} as the paper prints them (its Table 12), with ViT-B/16."""
    table = _table()
    return {method: dict(zip(table["tasks"], row, strict=True)) for method, row in table["accuracy"].items()}


def vpt_grid() -> dict[str, list[float]]:
    """The rates and decays that VPT's protocol chooses from on val200; see ``paper_vtab.toml``."""
    return _table()["vpt_grid"]


def _table() -> dict[str, Any]:
    return tomllib.loads((resources.files("zinit.tasks.vtab") / "paper.toml").read_text(encoding="utf-8"))
