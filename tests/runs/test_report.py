"""The report of a run: whole, harmless, and there even when the run was not finished."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.runs.pages import METRICS, RUN, gates, log_of, page_of, step
from zinit.data.images import thumbnail
from zinit.errors import DataError
from zinit.runs import plots, report
from zinit.runs.report import write_report


def test_a_finished_run(tmp_path: Path) -> None:
    html, page = page_of(tmp_path, log_of(20))
    assert "alpaca on llama" in page.words
    assert "Finished: 20 of 20 steps. 640 examples, 4.0 seconds" in page.words
    for row in ("loss (lower is better) 3.5 1.25 -2.25 200 7", "exact_match (higher is better) 0 0.75 +0.75 120 7"):
        assert row in page.words
    assert "train 1000, held out 200, evaluated 120, truncated 3, skipped 0" in page.words
    for title in (
        "learning rate",
        "gradient norm",
        "examples per second",
        "tokens per second",
        "held out: exact_match",
    ):
        assert title in page.words
    assert "train.learning_rate" not in page.words
    assert "scheduler.warmup 2" in page.words  # nested settings, flattened inside their fold
    assert page.words.count("exactly right") == 1
    assert html.count("<svg") == html.count('role="img"') == 9
    assert "prefers-color-scheme: dark" in html
    assert "currentColor" in html
    assert "var(--first)" in html
    assert not re.search("#01010[1-3]", html)
    assert "default-src 'none'" in html


@pytest.mark.parametrize(
    ("counts", "loss", "answers"),
    [
        ({"held_out": 9, "answered": 4}, "9", "4"),
        ({"evaluated": 5}, "5", "5"),
        ({"held_out": 9}, "9", "9"),
        ({}, "-", "-"),
    ],
)
def test_every_figure_says_how_many_examples_it_is_from(
    tmp_path: Path, counts: dict[str, int], loss: str, answers: str
) -> None:
    _, page = page_of(tmp_path, log_of(1), metrics=METRICS | {"counts": counts})
    assert f"loss (lower is better) 3.5 1.25 -2.25 {loss} 7" in page.words
    assert f"exact_match (higher is better) 0 0.75 +0.75 {answers} 7" in page.words


def test_only_the_demo_is_called_a_demo(tmp_path: Path) -> None:
    warning = "say nothing about the paper's results"
    assert warning in page_of(tmp_path, log_of(2))[1].words
    assert warning not in page_of(tmp_path, log_of(2), run=RUN | {"demo": False})[1].words


def test_untrusted_text_stays_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>\ud800\"'&{{ 7 * 7 }}"
    log = log_of(3)
    log[1] = {"event": "gates", "step": 0, "gates": {f"a.{evil[:50]}.x": [0.1], "a.$\\frac$.x": [0.2]}}
    samples = [{"prompt": evil, "expected": evil, "frozen": evil, "adapted": 3}]
    html, page = page_of(
        tmp_path, log, run=RUN | {"task": evil, evil: {evil: evil}}, metrics=METRICS | {"samples": samples}
    )
    assert "<script" not in html
    assert "<img" not in html
    assert "{{ 7 * 7 }}" in page.words
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_a_killed_run(tmp_path: Path) -> None:
    lines = [json.dumps(line) for line in log_of(7)[:-1]]
    log = "\n".join([*lines[:4], '{"event": "st', "[]", '"x"', *lines[4:], '{"event": "step", "step": 8, "lo'])
    _, page = page_of(tmp_path, log, metrics=None)
    assert "Killed or still running: 7 of 7 steps." in page.words
    assert "not been evaluated yet" in page.words
    assert "could not be read and were left out: 3." in page.words
    assert "Samples" not in page.words


def test_a_cut_off_last_line_is_no_fault(tmp_path: Path) -> None:
    text = "".join(json.dumps(line) + "\n" for line in log_of(3)) + '{"event": "step", "st'
    assert "could not be read" not in page_of(tmp_path, text)[1].words
    assert "left out: 1." in page_of(tmp_path, text + "\n")[1].words


def test_an_evaluation_of_the_frozen_model_alone(tmp_path: Path) -> None:
    metrics = {"metrics": {"frozen": {"loss": 3.5}}, "seed": 7, "samples": [{"prompt": "Where?", "expected": "Here."}]}
    _, page = page_of(tmp_path, [*log_of(3)[:-1], {"event": "stop", "step": 3}], metrics=metrics)
    assert "loss (lower is better) 3.5 - - 7" in page.words
    assert "not been evaluated yet" in page.words
    assert "Stopped, can be resumed: 3 of 3 steps." in page.words


@pytest.mark.parametrize(
    "log", [None, "", "\n\n", '{"event": "start"}\n', [{"event": "gates", "step": 0, "gates": {}}]]
)
def test_a_run_that_has_barely_begun(tmp_path: Path, log: Any) -> None:
    _, page = page_of(tmp_path, log, metrics=None)
    assert "No training step has been logged." in page.words
    assert "No gates have been logged." in page.words


def test_a_single_step(tmp_path: Path) -> None:
    html, page = page_of(tmp_path, log_of(1, heads=1, layers=1))
    assert "1 of 1 steps" in page.words
    assert "0.96" not in page.words  # steps are whole numbers
    assert html.count("<svg") == 8
    assert "held out:" not in page.words  # a single figure is no curve


def test_after_a_resume_the_later_line_wins(tmp_path: Path) -> None:
    log = [*log_of(6)[:-1], {"event": "resume", "step": 3}, *(step(number, 9.0) for number in (4, 5, 6))]
    log += [gates(5, value=0.5), {"event": "eval", "step": 5, "loss": 8.0}]
    page = page_of(tmp_path, log)[1]
    assert "6 of 6 steps. Resumed 1 time." in page.words
    assert "192 examples" in page.words
    read = report._Log.read(tmp_path / "log.jsonl")
    assert read.curve("loss")[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert read.curve("loss")[1].tolist() == [3, 1.5, 1, 9, 9, 9]
    assert read.curve("loss", evals=True)[1].tolist() == [8.0, 2.0]
    assert read.gates[5]["model.layers.2.self_attn"] == [2.5] * 4


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    log = log_of(300, every=100)
    spoiled = {5: math.nan, 6: math.inf, 7: None, 8: "x", 9: 10**400, 10: 1e308, 11: -1e308}
    for line in log:
        if line["event"] == "step" and line["step"] in spoiled:
            line["loss"] = line["grad_norm"] = spoiled[line["step"]]
    log[1]["gates"]["model.layers.2.self_attn"] = [math.nan, None, math.inf, 0.5]
    metrics = {"metrics": {"frozen": {"loss": math.nan, "f1": None}, "adapted": {"loss": math.inf, "f1": "x"}}}
    _, page = page_of(tmp_path, log, metrics=metrics)
    assert "not finite at 5 of 300 steps, first at 5." in page.words
    assert "loss (lower is better) nan inf -" in page.words


def test_a_run_of_nothing_but_nan(tmp_path: Path) -> None:
    log = [
        step(1, math.nan),
        step(2, math.nan),
        {"event": "eval", "step": 2, "loss": math.nan},
        gates(2, value=math.nan),
    ]
    _, page = page_of(tmp_path, log)
    assert "not finite at 2 of 2 steps" in page.words


@pytest.mark.filterwarnings("error")
def test_gates_open_from_an_empty_page(tmp_path: Path) -> None:
    _, page = page_of(tmp_path, log_of(20, every=2, layers=3, heads=4))
    now, over_time = (image for image in page.images if image.shape[:2] in ((3, 4), (12, 11)))
    assert (now[..., 3] == 1).all()
    opacity = over_time[..., 3]
    assert (opacity[:, 0] == 0).all()  # closed at step 0: the page shows through
    assert (np.diff(opacity, axis=1) > 0).all()
    assert (over_time[:, -1, 0] > over_time[:, -1, 2]).all()  # positive: more red than blue
    assert "Gates at step 20" in page.words
    assert "all are closed" not in page.words
    assert "all are closed" in page_of(tmp_path, [gates(0), gates(3, value=0.0)])[1].words


def test_layers_with_different_numbers_of_heads(tmp_path: Path) -> None:
    log = [
        {"event": "gates", "step": 1, "gates": {"vision.0": [0.5, 0.5, 0.5], "vision.1": [0.5], "text.0": [0.5, -0.5]}}
    ]
    _, page = page_of(tmp_path, log)
    (now,) = (image for image in page.images if image.shape[:2] == (3, 3))
    grey = np.abs(now - 0.5).max(2) < 0.01
    assert sorted(grey.sum(1).tolist()) == [0, 1, 2]
    for name in ("vision.0", "vision.1", "text.0"):
        assert name in page.words


def test_a_huge_run(tmp_path: Path) -> None:
    log = log_of(6000, every=20, layers=60, heads=64)
    html, page = page_of(tmp_path, log)
    assert len(html) < 1_500_000
    assert max(page.curves) <= plots.POINTS
    assert {image.shape[:2] for image in page.images} >= {(60, 64), (60 * 64, report.COLUMNS)}


def test_sites_are_named_by_what_tells_them_apart() -> None:
    assert report._short(["model.layers.2.self_attn", "model.layers.13.self_attn"]) == ["2", "13"]
    assert report._short(["text.0.attn", "vision.0.attn"]) == ["text", "vision"]
    assert report._short(["a.0", "a.0.b"]) == ["a.0", "b"]
    assert report._short(["only.one"]) == ["only.one"]


def test_many_samples_are_cut_and_counted(tmp_path: Path) -> None:
    samples = [
        {"prompt": f"prompt-{i}", "expected": "", "frozen": "", "adapted": ""} for i in range(report.SAMPLES + 3)
    ]
    _, page = page_of(tmp_path, log_of(1), metrics=METRICS | {"samples": samples})
    assert f"The first {report.SAMPLES} of {report.SAMPLES + 3}." in page.words
    assert f"prompt-{report.SAMPLES - 1} " in page.words
    assert f"prompt-{report.SAMPLES} " not in page.words


def test_damaged_files_are_named(tmp_path: Path) -> None:
    _, page = page_of(tmp_path, log_of(2), run="{", metrics='{"metrics": ')
    assert "run.json could not be read" in page.words
    assert "metrics.json could not be read" in page.words
    assert "2 of 2 steps" in page.words


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no run: neither run\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_reports_are_repeatable_and_leave_matplotlib_alone(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "red", "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        first, _ = page_of(tmp_path, log_of(3))
        assert dict(matplotlib.rcParams) == before
    assert page_of(tmp_path, log_of(3))[0] == first


@pytest.mark.integration
def test_plotting_is_imported_when_first_needed() -> None:
    code = "import sys, zinit.runs.report; sys.exit(any(name in sys.modules for name in ('matplotlib', 'jinja2')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


# --- samples ------------------------------------------------------------------------------------------


def test_a_sample_shows_the_instruction_and_not_its_template(tmp_path: Path) -> None:
    sample = {
        "instruction": "Name a port.",
        "prompt": "Below is an instruction ... Name a port.",
        "expected": "Oldport.",
    }
    _, page = page_of(tmp_path, log_of(1), metrics=METRICS | {"samples": [sample]})
    assert "Name a port." in page.words
    assert "Below is" not in page.words


def test_a_sample_shows_its_picture_and_nobody_elses(tmp_path: Path) -> None:
    picture = torch.zeros(3, 300, 200, dtype=torch.uint8)
    picture[0] = 200
    samples = [{"prompt": "test/7.png", "image": image, "expected": "red"} for image in
               (thumbnail(picture), "data:text/html,<b>", "https://example.org/x.jpg", 7)]  # fmt: skip
    html, page = page_of(tmp_path, log_of(1), metrics=METRICS | {"samples": samples})
    (found,) = page.pictures
    assert found.size == (64, 96)
    assert np.abs(np.asarray(found)[40, 30].astype(int) - [200, 0, 0]).max() < 12
    assert "example.org" not in html
    assert "text/html" not in html.replace('http-equiv="Content', "")


def test_a_table_that_is_wider_than_the_page_shows_that_it_goes_on() -> None:
    css = (Path(report.__file__).parents[1] / "page.css").read_text()
    wide = re.search(r"\.wide \{(.*?)\}", css, re.DOTALL)
    assert wide is not None
    assert "overflow-x: auto" in wide[1]
    assert wide[1].count(" local") == wide[1].count(" scroll") == 2, (
        "a cover that moves along, over a shadow that stays"
    )
