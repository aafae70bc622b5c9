"""The command that a report shows makes the same run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.runs.pages import RUN, log_of, page_of
from zinit.runs.command import command_of
from zinit.runs.settings import resolve


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"backbone": "llama"}, []),
        ({"backbone": "llama", "seed": 3}, ["prefix.layers=0,2", "train.epochs=0.5", "train.clip_norm=none"]),
        ({"backbone": "llama", "data": ("a.json", "b c.json")}, ["train.steps=3"]),
        ({"backbone": "clip"}, ["prefix.towers=vision_model", "task.template=a {} or 'none'.", "train.steps=3"]),
        ({"backbone": "vit"}, ["method=lora", "method.rank=3", "task.normalisation=none", "train.rates.gates=0.5"]),
        (
            {"backbone": "llama", "preset": "llama-7b"},
            ["parts.late.length=4", "parts.same.length=10", "train.epochs=1"],
        ),
        (
            {"backbone": "roberta", "task": "ner", "model": "a/b", "data": "c.txt"},
            ["task.labels=O,B-1", "dtype=float32"],
        ),
        (
            {"backbone": "roberta", "model": "a/b", "data": "it's here.json"},
            ["task.version=1.1", 'task.held_out_data="true"'],
        ),
    ],
)
def test_the_command_makes_the_same_settings(arguments: dict[str, Any], options: list[str]) -> None:
    config, preset = resolve(**arguments, options=options)
    text = command_of(config, preset)
    assert text is not None
    words = shlex.split(text)
    assert words[:2] == ["zinit", "train"]
    flags: dict[str, Any] = {}
    again: list[str] = []
    for flag, value in zip(words[2::2], words[3::2], strict=True):
        if flag == "-o":
            again.append(value)
        elif flag == "--data" and "data" in flags:
            flags["data"] = (*([flags["data"]] if isinstance(flags["data"], str) else flags["data"]), value)
        else:
            flags[flag.removeprefix("--")] = int(value) if flag == "--seed" else value
    assert resolve(**flags, options=again) == (config, preset)


def test_the_page_shows_the_command_of_a_run_that_says_its_settings(tmp_path: Path) -> None:
    config, preset = resolve(backbone="llama", options=["prefix.length=3"])
    _, page = page_of(tmp_path, log_of(1), run=RUN | {"config": config.to_dict(), "preset": str(preset)})
    assert "zinit train --backbone llama --task alpaca --preset alpaca/demo --seed 0 -o prefix.length=3" in page.words
    assert "zinit train" not in page_of(tmp_path, log_of(1), run=RUN | {"config": {"backbone": 3}})[1].words
