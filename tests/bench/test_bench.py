"""The benchmark: cells are run once, whatever kills it; the figures are those of the cells."""

from __future__ import annotations

import csv
import functools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT, environment
from zinit.bench.place import _die_with_parent
from zinit.bench.plan import Benchmark, list_bench_presets, make_benchmark
from zinit.bench.runner import Runner, _failure, final_cells, read_cells
from zinit.bench.summary import summarise
from zinit.bench.write import write_summary
from zinit.errors import ConfigError, DataError
from zinit.files import claim
from zinit.ui import benchmark as ui
from zinit.ui.benchmark import Finished

pytestmark = pytest.mark.integration

FAKE = (sys.executable, str(Path(__file__).with_name("fake_zinit.py")))
TWO = """
description = "two tables"
seeds = [0, 1, 2]
methods = ["zero-init", "random-gate", "bitfit"]
[[experiment]]
name = "one"
backbone = "llama"
metric = "accuracy"
method_options = { all = ["train.learning_rate=3"] }
[[experiment]]
name = "layers"
backbone = "llama"
metric = "accuracy"
methods = ["zero-init"]
vary = { "prefix.layers" = [1, 2] }
"""


def benchmark(folder: Path, text: str = TWO, **said: Any) -> Benchmark:
    (folder / "bench.toml").write_text(text)
    return make_benchmark(config_file=str(folder / "bench.toml"), **said)


def started(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def test_every_cell_runs_once(tmp_path: Path, journal: Path) -> None:
    plan = benchmark(tmp_path)
    cells = final_cells(plan, tmp_path / "none")
    assert len(cells) == 3 * 3 + 3 * 2
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    for _ in range(2):
        Runner(plan, tmp_path / "out", jobs=3, launcher=FAKE).run()
    assert sorted(entry["cell"] for entry in started(journal)) == sorted(cell.id for cell in cells)
    found = read_cells(tmp_path / "out")
    assert {cell["status"] for cell in found if cell["cell"]["method"] == "bitfit"} == {"refused"}
    assert all(cell["status"] == "done" for cell in found if cell["cell"]["method"] != "bitfit")
    assert found[0]["curves"]["train loss"] == [] or found[0]["curves"]["train loss"][-1] == [4, 0.25]


def test_a_cell_is_named_by_all_of_its_settings(tmp_path: Path) -> None:
    plans = [benchmark(tmp_path), benchmark(tmp_path, TWO.replace("rate=3", "rate=4")), benchmark(tmp_path, seeds=[7])]
    names = [{cell.id for cell in final_cells(plan, tmp_path / "none")} for plan in plans]
    assert len(names[0]) == 15
    assert len(names[0] & names[1]) == 6  # those of the other experiment
    assert not names[0] & names[2]
    commands = [cell.command() for cell in final_cells(plans[0], tmp_path / "none")]
    assert (
        "zinit train --backbone llama --task alpaca --preset alpaca/demo --seed 0 -o method=zero-init " in commands[0]
    )
    assert any(command.endswith("-o prefix.layers=2") for command in commands)


def test_the_summary_is_the_arithmetic_of_the_cells(tmp_path: Path, journal: Path) -> None:
    plan = benchmark(tmp_path)
    Runner(plan, tmp_path / "out", jobs=4, launcher=FAKE).run()
    rows = {(row.experiment, row.method, str(row.vary)): row for row in write_summary(plan, tmp_path / "out")}
    row = rows["one", "random-gate", "{}"]
    assert row.values == pytest.approx({0: 0.5, 1: 0.49, 2: 0.44})
    assert row.mean == pytest.approx(1.43 / 3)
    assert row.std == pytest.approx(statistics.stdev([0.5, 0.49, 0.44]))
    assert (row.base, row.samples, row.num_trainable, row.missing) == (pytest.approx(0.1), 50, 7, [])
    assert row.difference == pytest.approx(-1 / 3)
    assert row.difference_std == pytest.approx(statistics.stdev([-0.3, -0.32, -0.38]))  # paired by seed
    assert row.pairs == 3
    assert row.losses == pytest.approx({0: 1.0, 1: 1.02, 2: 1.12})
    assert (row.base_loss, row.loss_difference) == (4.0, pytest.approx(2 / 3))
    assert row.loss_difference_std == pytest.approx(2 * statistics.stdev([0.3, 0.32, 0.38]))
    assert row.rates == {"": 3.0, "gates": 1.5}
    assert rows["one", "zero-init", "{}"].difference is None
    assert "no bias terms" in rows["one", "bitfit", "{}"].problem
    assert rows["layers", "zero-init", "{'prefix.layers': 2}"].mean == pytest.approx(0.61)
    with (tmp_path / "out" / "summary.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["mean"]) for line in table if line["method"] == "random-gate"] == pytest.approx([1.43 / 3])
    text = (tmp_path / "out" / "summary.md").read_text()
    figures = "0.477 | 0.032 | 0, 1, 2 | 50 | 0.100 | -0.333 ± 0.042 (3)"
    loss = "1.047 | 4.000 | +0.667 ± 0.083 (3)"
    assert f"| random-gate | - | accuracy | {figures} | {loss} | 3, gates 1.5 | 7 |" in text
    assert "Demo figures" in text
    assert "paper's" not in text.split("## one")[1]  # no column for what is not known


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.captions: list[str] = []
        self.svgs = self.lines = 0
        self.links: list[str] = []
        self._in_caption = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.svgs += tag == "svg"
        self.lines += tag == "path"
        self._in_caption = tag == "figcaption"
        self.links += [value or "" for name, value in attrs if name in ("src", "href") and tag != "use"]
        assert tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_caption and data.strip():
            self.captions.append(data.strip())


def test_the_page_holds_its_plots(tmp_path: Path, journal: Path) -> None:
    plan = benchmark(tmp_path)
    Runner(plan, tmp_path / "out", jobs=4, launcher=FAKE).run()
    write_summary(plan, tmp_path / "out")
    page = Page()
    page.feed((tmp_path / "out" / "report.html").read_text())
    assert [caption.split(" by")[0] for caption in page.captions] == [
        "accuracy against trainable parameters",
        "train loss",
        "accuracy against prefix.layers",
    ]
    assert page.svgs == 3
    assert page.lines > 20
    assert all(link.startswith(("data:", "#")) for link in page.links)


def test_an_empty_benchmark_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_summary(benchmark(tmp_path), tmp_path / "out")
    assert "15 runs not finished" in (tmp_path / "out" / "report.html").read_text()


def is_running(pid: int) -> bool:
    """Dead ones whose new parent has not looked at them yet do not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_death(entries: list[dict[str, Any]]) -> None:
    until = time.monotonic() + 10
    while any(is_running(entry["pid"]) for entry in entries):
        assert time.monotonic() < until, "it goes on"
        time.sleep(0.02)


def killed_runner(folder: Path, out: Path, seconds: float) -> subprocess.Popen[bytes]:
    """A benchmark in a process of its own; each of its runs takes so long."""
    code = (
        "import sys; from pathlib import Path; from zinit.bench.plan import make_benchmark; "
        "from zinit.bench.runner import Runner; "
        f"Runner(make_benchmark(config_file={str(folder / 'bench.toml')!r}), Path({str(out)!r}), jobs=2, "
        f"launcher={FAKE!r}).run()"
    )
    return subprocess.Popen([sys.executable, "-c", code], env={**environment(), "FAKE_SECONDS": str(seconds)}, cwd=ROOT)


@pytest.mark.skipif(sys.platform != "linux", reason="a benchmark takes its runs along only on Linux")
def test_its_runs_die_with_it(tmp_path: Path, journal: Path) -> None:
    """So that nobody writes beside the one that resumes."""
    benchmark(tmp_path)
    process = killed_runner(tmp_path, tmp_path / "out", seconds=60)
    while not journal.exists() or len(started(journal)) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    entries = started(journal)
    assert all(is_running(entry["pid"]) for entry in entries)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for_death(entries)


@pytest.mark.skipif(sys.platform != "linux", reason="a benchmark takes its runs along only on Linux")
def test_a_run_whose_benchmark_was_killed_while_it_began_does_not_begin(tmp_path: Path) -> None:
    began = tmp_path / "began"
    command = [sys.executable, "-c", f"open({str(began)!r}, 'w')"]
    for parent, code in ((os.getpid(), 0), (1, 1)):  # 1: of those whose parent is gone
        began.unlink(missing_ok=True)
        process = subprocess.Popen(command, preexec_fn=functools.partial(_die_with_parent, parent))
        assert process.wait() == code
        assert began.exists() == (code == 0)


@pytest.mark.skipif(sys.platform != "linux", reason="a benchmark takes its runs along only on Linux")
def test_killed_in_the_middle_it_finishes_without_repeating(tmp_path: Path, journal: Path) -> None:
    plan, out = benchmark(tmp_path), tmp_path / "out"
    process = killed_runner(tmp_path, out, seconds=0.3)
    while len(list(out.glob("cells/*.json"))) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.read_bytes() for path in out.glob("cells/*.json")}
    wait_for_death(started(journal)[-2:])
    before = started(journal)
    begun = {path.parent.name for path in out.glob("runs/*/run.json")} - {Path(name).stem for name in finished}
    Runner(plan, out, jobs=2, launcher=FAKE).run()
    later = started(journal)[len(before) :]
    assert not {f"{entry['cell']}.json" for entry in later} & finished.keys()
    assert all((out / "cells" / name).read_bytes() == data for name, data in finished.items())
    assert len(read_cells(out)) == 15
    assert {entry["cell"] for entry in later if entry["resumed"]} == begun


def test_asked_to_stop_it_stops(tmp_path: Path, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "30")
    runner = Runner(benchmark(tmp_path), tmp_path / "out", jobs=2, launcher=FAKE)
    threading.Timer(2.0, runner.stop).start()
    began = time.monotonic()
    runner.run()
    assert time.monotonic() - began < 20
    assert len(started(journal)) == 2
    assert [c for c in read_cells(tmp_path / "out") if c["status"] != "refused"] == []


def test_a_failed_cell_is_tried_again_and_others_go_on(tmp_path: Path, journal: Path) -> None:
    plan = benchmark(tmp_path, methods=["full", "zero-init"], seeds=[0])
    events: list[dict[str, Any]] = []
    Runner(plan, tmp_path / "out", jobs=1, launcher=FAKE, on_event=events.append).run()
    failed = [event for event in events if event["event"] == "cell" and event["status"] == "failed"]
    assert [event["error"] for event in failed] == ["RuntimeError: a fault"] * 3
    assert len(read_cells(tmp_path / "out")) == 3
    row = next(row for row in summarise(plan, tmp_path / "out") if row.method == "full")
    assert row.missing == [0]
    Path(f"{journal}.mended").touch()
    Runner(plan, tmp_path / "out", jobs=1, launcher=FAKE).run()
    assert len(read_cells(tmp_path / "out")) == 6


def run(plan: Benchmark, output: Path, monkeypatch: pytest.MonkeyPatch, **said: Any) -> Finished:
    monkeypatch.setattr(ui, "Runner", functools.partial(Runner, launcher=FAKE))
    return ui.run_benchmark(plan, output, jobs=1, **said)


def test_what_may_be_mended_is_tried_again_by_the_same_command(
    tmp_path: Path, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = benchmark(tmp_path, methods=["head-only", "bitfit"], seeds=[0])
    assert plan.experiments[1].methods == ("head-only", "bitfit")
    plan = Benchmark(experiments=plan.experiments[:1])
    finished = run(plan, tmp_path / "out", monkeypatch, quiet=True)
    assert [name.split(".")[1] for name in finished.failed] == ["head-only"]
    assert finished.status == 1
    assert [cell["cell"]["method"] for cell in read_cells(tmp_path / "out")] == ["bitfit"]
    Path(f"{journal}.mended").touch()
    finished = run(plan, tmp_path / "out", monkeypatch, quiet=True)
    assert (finished.failed, finished.status, finished.complete) == ([], 0, True)
    assert [entry["cell"].split(".")[1] for entry in started(journal)] == ["head-only", "bitfit", "head-only"]


def test_nothing_measured_is_no_success(
    tmp_path: Path, journal: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = Benchmark(experiments=benchmark(tmp_path, methods=["bitfit"], seeds=[0]).experiments[:1])
    assert run(refused, tmp_path / "refused", monkeypatch, quiet=True).status == 2
    assert "nothing was measured" in capsys.readouterr().err
    plan = Benchmark(experiments=benchmark(tmp_path, methods=["zero-init"], seeds=[0]).experiments[:1])
    late = run(plan, tmp_path / "late", monkeypatch, budget=0)
    assert (late.status, late.left_out) == (1, 1)
    told = capsys.readouterr().err
    assert "1 runs are left: the budget is spent" in told
    assert "0/1" in told
    assert "1/1" not in told
    assert run(plan, tmp_path / "late", monkeypatch, quiet=True).status == 0


def test_within_its_budget_a_run_starts_however_long_others_took(tmp_path: Path, journal: Path) -> None:
    plan = Benchmark(experiments=benchmark(tmp_path, methods=["zero-init"], seeds=[0, 1]).experiments[:1])
    first, second = final_cells(plan, tmp_path / "out")
    Runner(plan, tmp_path / "out", jobs=1, launcher=FAKE).run()
    file = tmp_path / "out" / "cells" / f"{first.id}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "wall_seconds": 1e9}))
    (tmp_path / "out" / "cells" / f"{second.id}.json").unlink()
    Runner(plan, tmp_path / "out", jobs=1, budget=300, launcher=FAKE).run()
    assert len(read_cells(tmp_path / "out")) == 2


def test_the_budget_is_kept(tmp_path: Path, journal: Path) -> None:
    events: list[dict[str, Any]] = []
    runner = Runner(benchmark(tmp_path), tmp_path / "out", jobs=1, budget=0, launcher=FAKE, on_event=events.append)
    runner.run()
    assert started(journal) == []
    assert len([event for event in events if event["event"] == "budget"]) == 15


SELECTION = """
seeds = [5, 6]
methods = ["zero-init"]
[[experiment]]
name = "chosen"
backbone = "llama"
metric = "accuracy"
[experiment.select]
vary = { "train.learning_rate" = [1, 2, 3.5, 2.5] }
options = ["task.held_out=3"]
"""


def test_settings_are_chosen_before_the_final_runs(tmp_path: Path, journal: Path) -> None:
    plan = benchmark(tmp_path, SELECTION)
    assert final_cells(plan, tmp_path / "out") == []
    Runner(plan, tmp_path / "out", jobs=2, launcher=FAKE).run()
    final = final_cells(plan, tmp_path / "out")
    assert [(cell.seed, cell.options) for cell in final] == [
        (5, ("train.learning_rate=3.5",)),  # 3.5 and 2.5 do equally well: the first of them
        (6, ("train.learning_rate=3.5",)),
    ]
    trials = [cell for cell in read_cells(tmp_path / "out") if "selection" in cell["cell"]["experiment"]]
    assert len(trials) == 4
    assert all("task.held_out=3" in cell["cell"]["options"] for cell in trials)
    assert all(cell["curves"] == {} for cell in trials)
    assert all(cell["curves"] for cell in read_cells(tmp_path / "out") if cell not in trials)
    (row,) = summarise(plan, tmp_path / "out")
    assert row.values == pytest.approx({5: 0.8, 6: 0.81})


def test_cells_are_a_line_each_and_longer_files_count_too(tmp_path: Path, journal: Path) -> None:
    plan = benchmark(tmp_path, SELECTION)
    Runner(plan, tmp_path / "out", jobs=2, launcher=FAKE).run()
    rows, files = summarise(plan, tmp_path / "out"), list((tmp_path / "out" / "cells").iterdir())
    assert len(files) == 6
    for file in files:
        assert file.read_text().count("\n") == 1
        file.write_text(json.dumps(json.loads(file.read_text()), indent=2))  # as they were written before
    Runner(plan, tmp_path / "out", jobs=2, launcher=FAKE).run()
    assert len(started(journal)) == 6
    assert summarise(plan, tmp_path / "out") == rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seeds = [0]", "one or more [[experiment]]"),
        ("sedes = [0]\n" + TWO, "a benchmark has no setting 'sedes'. Did you mean 'seeds'"),
        (TWO.replace('backbone = "llama"', 'backbone = "lama"', 1), "no backbone named 'lama'. Did you mean 'llama'"),
        (TWO.replace("bitfit", "bitfot"), "no method named 'bitfot'. Did you mean 'bitfit'"),
        (TWO.replace('name = "layers"', 'name = "one"'), "two experiments are named 'one'"),
        (TWO.replace("[1, 2]", "3"), "vary must be a table that maps a setting to a list of values"),
        (TWO.replace("[0, 1, 2]", '["a"]'), "seeds must be a list of whole numbers of at least 0"),
        (TWO.replace("metric =", "metrik ="), "no setting 'metrik'. Did you mean 'metric'"),
        (TWO.replace("{ all", "{ al"), "no method named 'al'"),
    ],
)
def test_what_is_wrong_is_named(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        benchmark(tmp_path, text)
    assert expected in str(caught.value)


def test_wrong_settings_stop_before_anything_runs(tmp_path: Path) -> None:
    plan = benchmark(tmp_path, TWO.replace("prefix.layers", "prefix.leyers"))
    with pytest.raises(ConfigError, match=r"experiment 'layers': no option named 'prefix\.leyers'"):
        plan.check()


def test_folders_that_are_not_for_it(tmp_path: Path, journal: Path) -> None:
    plan = benchmark(tmp_path)
    with pytest.raises(ConfigError, match="holds something that is no benchmark"):
        Runner(plan, tmp_path, launcher=FAKE)
    Runner(plan, tmp_path / "out", budget=0, launcher=FAKE).run()
    one = Runner(plan, tmp_path / "out", budget=0, launcher=FAKE)
    with claim(one.output, tell=print), pytest.raises(ConfigError, match="is in use by process"):
        Runner(plan, tmp_path / "out", launcher=FAKE).run()
    killed = tmp_path / "killed"  # before its first file was whole
    killed.mkdir()
    (killed / ".bench.json.abcd1234.partial").write_text("{")
    (killed / ".claim.json").write_text(json.dumps({"host": socket.gethostname(), "process": 1, "since": "then"}))
    events: list[Any] = []
    Runner(plan, killed, budget=0, launcher=FAKE, on_event=events.append).run()
    assert events[0]["event"] == "notice"
    assert "was killed; this process goes on with it" in events[0]["text"]
    assert sorted(path.name for path in killed.iterdir()) == ["bench.json", "cells"]
    (tmp_path / "out" / "cells" / "x.json").write_text("{")
    with pytest.raises(DataError, match=r"x\.json is damaged"):
        read_cells(tmp_path / "out")


@pytest.mark.parametrize("name", sorted(list_bench_presets()))
def test_presets_are_complete(name: str) -> None:
    embedded = name in ("demo", "family")
    plan = make_benchmark(preset=name, data=None if embedded else "data", model=None if embedded else "m")
    plan.check()
    assert plan.description
    assert all(experiment.seeds and experiment.methods for experiment in plan.experiments)


@pytest.mark.parametrize(
    ("status", "out", "err", "expected"),
    [
        (2, {"error": "no biases", "by_settings": True}, "zinit: no biases", "refused"),
        (2, {"error": "no space", "by_settings": False}, "zinit: no space", "failed"),
        (2, {"error": "x", "by_settings": True}, "zinit: the output RUN is not writable", "failed"),  # its own folder
        (2, None, "zinit: said by another version", "failed"),
        (1, {"by_settings": True}, "Traceback", "failed"),
        (2, None, "", "failed"),
    ],
)
def test_trouble_with_its_own_folder_is_none_of_the_settings(
    status: int, out: Any, err: str, expected: str, tmp_path: Path
) -> None:
    text = b"" if out is None else json.dumps(out).encode()
    found = _failure(status, text, err.replace("RUN", str(tmp_path)).encode(), tmp_path)
    assert found["status"] == expected
    assert found["error"]
