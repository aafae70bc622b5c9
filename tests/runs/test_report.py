"""The report of a run: whole, harmless, and there even when the run was not finished."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from zinit.data.images import THUMBNAIL_START, thumbnail
from zinit.errors import DataError
from zinit.runs import plots, report
from zinit.runs.command import command_of
from zinit.runs.report import write_report
from zinit.runs.settings import resolve

RUN = {
    "backbone": "llama",
    "task": "alpaca",
    "model": "embedded demo",
    "data": "embedded demo",
    "demo": True,
    "seed": 7,
    "preset": None,
    "prefix": {"length": 10, "layers": 2},
    "train": {"learning_rate": 0.009, "scheduler": {"warmup": 2}},
}
METRICS = {
    "metrics": {
        "frozen": {"loss": 3.5, "perplexity": 33.12, "exact_match": 0.0},
        "adapted": {"loss": 1.25, "perplexity": 3.49, "exact_match": 0.75},
    },
    "counts": {"train": 1000, "held_out": 200, "evaluated": 120, "truncated": 3, "skipped": 0},
    "samples": [{"prompt": "Where?", "expected": "Oldport.", "frozen": "the the", "adapted": "Oldport."}],
    "seconds": 12.5,
    "steps": 20,
    "seed": 7,
}
VOID = {"meta", "link", "br", "hr", "img", "input"}


def step(number: int, loss: float = 1.0) -> dict[str, Any]:
    rates = {"examples_per_second": 160.0, "tokens_per_second": 9000.0}
    return {
        "event": "step",
        "step": number,
        "loss": loss,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "examples": 32,
        "seconds": 0.2,
    } | rates


def gates(number: int, layers: int = 2, heads: int = 4, value: float = 0.1) -> dict[str, Any]:
    sites = {f"model.layers.{layer + 2}.self_attn": [number * value] * heads for layer in range(layers)}
    return {"event": "gates", "step": number, "gates": sites}


def log_of(steps: int, every: int = 5, **shape: int) -> list[dict[str, Any]]:
    lines = [{"event": "plan", "steps": steps, "done": 0}, gates(0, **shape)]
    for number in range(1, steps + 1):
        lines.append(step(number, 3.0 / number))
        if number % every == 0 or number == steps:
            lines += [gates(number, **shape), {"event": "eval", "step": number, "loss": 2.0, "exact_match": 0.5}]
    return [*lines, {"event": "end", "step": steps}]


def page_of(
    folder: Path, log: list[dict[str, Any]] | str | None, run: Any = RUN, metrics: Any = METRICS
) -> tuple[str, Page]:
    text = log if isinstance(log, str) or log is None else "".join(json.dumps(line) + "\n" for line in log)
    for name, content in (("run.json", run), ("metrics.json", metrics), ("log.jsonl", text)):
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    before = {path.name for path in folder.iterdir()}
    path = write_report(folder)
    assert path == folder / "report.html"
    assert {path.name for path in folder.iterdir()} == before | {"report.html"}  # no temporary file
    html = path.read_text("utf-8")
    return html, Page(html)


class Page(HTMLParser):
    """Checks while it reads that every element is closed, ids are unique, and nothing is fetched or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.text: list[str] = []
        self.images: list[np.ndarray] = []
        self.curves: list[int] = []
        self.pictures: list[Image.Image] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.words = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object", "embed")
        if tag == "img":
            source = dict(attrs)["src"] or ""
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(source.removeprefix(THUMBNAIL_START)))))
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name == "id":
                assert value not in self.ids
                self.ids.add(value or "")
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                assert value is not None
                assert value.startswith(("#", "data:")), value
                if value.startswith("data:image/png;base64,"):
                    from matplotlib.image import imread

                    self.images.append(imread(io.BytesIO(base64.b64decode(value.partition(",")[2])), "png"))
            elif not name.startswith("xmlns"):
                assert "://" not in (value or "")
            assert all(found == "#" for found in re.findall(r"url\(['\"]?(.)", value or ""))
            if name == "d":
                self.curves.append((value or "").count("L"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            assert "@import" not in data
            assert "url(" not in data
        else:
            self.text.append(data)


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


def test_long_curves_keep_their_spikes() -> None:
    x, y = np.arange(50_000.0), np.ones(50_000)
    y[31_415], y[27_182], y[100:300] = 9.0, -9.0, math.nan
    thin_x, thin_y = plots.thin(x, y)
    assert len(thin_x) <= plots.POINTS
    assert (thin_x[0], thin_x[-1]) == (0, 49_999)
    assert (thin_x[np.nanargmax(thin_y)], thin_x[np.nanargmin(thin_y)]) == (31_415, 27_182)
    assert np.isnan(thin_y).any()


def test_smoothing_starts_unbiased_and_passes_over_gaps() -> None:
    smooth = plots.smooth(np.array([math.nan, 4.0, 4.0, math.inf, 4.0, 1.0]), 3)
    assert np.isnan(smooth[[0, 3]]).all()
    assert smooth[[1, 2, 4]].tolist() == [4, 4, 4]
    assert smooth[5] == pytest.approx(
        (0.5 * 1 + 0.4375 * 4) / 0.9375
    )  # each value has half the weight of its successor


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


# --- what a figure shows ----------------------------------------------------------------------------------------------


def figures_of(folder: Path, log: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """{label: figure} of a report, before they become SVG."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(plots, "svg", lambda figure, label: found.setdefault(label, figure) and "")
    page_of(folder, log)
    return found


def gates_now(number: int, gates: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [{"event": "gates", "step": number, "gates": gates}]


@pytest.mark.parametrize("label", ["gates at step 3", "every gate by step"])
def test_the_topmost_layer_is_on_top_and_beside_its_own_name(
    label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer n has gates of n tenths: the higher a row, the further its colour is from the page's."""
    gates = {f"layers.{layer}.attn": [layer / 10] * 2 for layer in range(1, 6)}
    figure = figures_of(tmp_path, gates_now(3, gates), monkeypatch)[label]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba()).astype(float)
    axes = figure.axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    places = [axes.transData.transform((0, place + 0.3)) for place in axes.get_yticks()]
    heights = [y for _, y in places]
    strength = [np.abs(pixels[-1 - int(y), int(x), :3] - 255).max() for x, y in places]
    assert names == ["1", "2", "3", "4", "5"]
    assert heights == sorted(heights)
    assert strength == sorted(strength)
    assert len(set(strength)) == 5


def test_the_mean_is_of_absolute_gates_and_of_the_heads_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = [*gates_now(0, {"a.0": [0.0, 0.0], "a.1": [0.0]}), *gates_now(5, {"a.0": [0.5, -0.3], "a.1": [-0.2]})]
    figure = figures_of(tmp_path, log, monkeypatch)["mean gate of each layer by step"]
    lines = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    assert lines["0"] == pytest.approx([0.0, 0.4])
    assert lines["1"] == pytest.approx([0.0, 0.2])


@pytest.mark.parametrize(
    ("layers", "named", "title"), [(8, 8, "layer"), (16, 16, "layer"), (40, 14, "layer, 1 of 3 named")]
)
def test_every_curve_has_a_name_or_the_legend_says_how_many(
    layers: int, named: int, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = figures_of(tmp_path, log_of(4, every=2, layers=layers), monkeypatch)["mean gate of each layer by step"]
    legend = figure.axes[0].get_legend()
    assert len(figure.axes[0].lines) == layers
    assert len(legend.get_texts()) == named
    assert legend.get_title().get_text() == title


# --- samples and the command ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"backbone": "llama"}, []),
        ({"backbone": "llama", "seed": 3}, ["prefix.layers=0,2", "train.epochs=0.5", "train.clip_norm=none"]),
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
        else:
            flags[flag.removeprefix("--")] = int(value) if flag == "--seed" else value
    assert resolve(**flags, options=again) == (config, preset)


def test_the_page_shows_the_command_of_a_run_that_says_its_settings(tmp_path: Path) -> None:
    config, preset = resolve(backbone="llama", options=["prefix.length=3"])
    _, page = page_of(tmp_path, log_of(1), run=RUN | {"config": config.to_dict(), "preset": str(preset)})
    assert "zinit train --backbone llama --task alpaca --preset alpaca/demo --seed 0 -o prefix.length=3" in page.words
    assert "zinit train" not in page_of(tmp_path, log_of(1), run=RUN | {"config": {"backbone": 3}})[1].words
