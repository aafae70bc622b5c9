"""``zinit tune``: known optima are found; whatever stops a search, the same command goes on with the same trials."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from tests.bench.test_bench import FAKE, Page, started
from tests.cli.conftest import Zinit
from tests.tiny import save_records, save_tiny_llama
from zinit.bench import tune
from zinit.bench.runner import Runner
from zinit.errors import ZinitError
from zinit.runs.settings import resolve
from zinit.runs.train import build
from zinit.train.loop import ignore
from zinit.train.plan import rates_by_role

pytestmark = pytest.mark.integration

OWN = ("prefix.parametrization=key_value", "prefix.init_std=0.02")

CONVERSATION = ("tune", "--backbone", "llama", "--task", "conversation", "-o", "train.learning_rate=1", "--jobs", 2)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, journal: Path) -> None:
    monkeypatch.setattr(tune, "Runner", functools.partial(Runner, launcher=FAKE))


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tune.json").read_text())


def options(folder: Path) -> list[list[str]]:
    return [trial["options"] for trial in record(folder)["trials"]]


def test_the_best_rate_is_found_and_the_command_says_it(tmp_path: Path, zinit: Zinit) -> None:
    out = tmp_path / "out"
    done = zinit(*CONVERSATION, "--trials", 14, "--output", out)
    assert done.code == 0, done.err
    document = record(out)
    assert document["search"]["space"] == {"own": [0.1, 10.0], "prefix.length": [2, 40], "prefix.layers": [1, 4]}
    first = document["trials"][0]
    assert first["settings"] == {"own": 1.0, "prefix.length": 10, "prefix.layers": 4}, "as the method begins"
    assert len(document["trials"]) == 14
    for trial in document["trials"]:
        rate = trial["settings"]["own"]  # on a rate of 1; see fake_zinit.py
        assert trial["value"] == pytest.approx(2 - 2 * (0.8 - abs(rate - 3) / 10), abs=1e-5)
        said = json.loads((out / "runs" / trial["cell"] / "run.json").read_text())["said"]
        assert "task.validation=true" in said, "on the validation part"
    best = document["best"]
    assert best["value"] == min(trial["value"] for trial in document["trials"])
    assert 1.5 < best["settings"]["own"] < 6, "3 is best"
    words = shlex.split(best["command"])
    assert words[:2] == ["zinit", "train"]
    assert set(best["options"]) <= set(words)
    assert f"train.learning_rate={best['settings']['own']:.6g}" in words
    assert not any("validation" in word or "held_out" in word for word in words), "figures are of another part"
    assert best["command"] in done.out
    page = Page()
    page.feed((out / "report.html").read_text())
    assert page.captions == ["loss on the validation part by trial"]
    assert "<td>done</td>" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, ["train.learning_rate=0.03", "train.rates.gates=10", *OWN]),
        ({"method": "zero-init-tuned"}, ["train.rates.tuning=0.01", *OWN]),
        ({"method": "gated-prefix-tuning"}, ["train.rates.prompts=3", "train.rates.gates=3", *OWN]),
        ({"options": ["train.learning_rate=1"]}, ["train.learning_rate=1", "prefix.parametrization=prompt"]),
        ({"options": ["prefix.parametrization=prompt"]}, ["train.rates.gates=1"]),
        ({"options": ["zero-init:prefix.parametrization=prompt"]}, ["train.rates.gates=1"]),
        ({"method": "hyper-prompts"}, ["train.rates.source=0.1", "train.rates.gates=1"]),
        ({"method": "lora"}, []),
    ],
)
def test_on_a_model_of_ones_own_a_search_begins_where_training_does(
    given: dict[str, Any], options: list[str], tmp_path: Path
) -> None:
    model, data = str(save_tiny_llama(tmp_path / "model")), str(save_records(tmp_path / "data.json"))
    held_out = [f"task.held_out_data={save_records(tmp_path / 'held_out.json', 9)}"]
    plan = tune.make_plan(backbone="llama", model=model, data=data, validation=held_out, **given)
    first, _ = plan.trial(plan.start)
    searched = resolve(backbone="llama", model=model, data=data, options=first.all_options())
    trained = resolve(
        backbone="llama", model=model, data=data, method=given.get("method"), options=_plain(given.get("options", ()))
    )
    found = [
        build(config, tmp_path, preset=preset, resume=False, on_event=ignore) for config, preset in (searched, trained)
    ]
    (config, rates), expected = ((run.config, rates_by_role(run.task, run.config.train)) for run in found)
    assert (config.prefix.parametrization, config.prefix.init_std, rates) == (
        *(expected[0].prefix.parametrization, expected[0].prefix.init_std),
        expected[1],
    )
    assert set(options) <= set(first.all_options())
    assert not found[0].scaled, "all that is chosen is said"


def _plain(options: Sequence[str]) -> list[str]:
    return [option.removeprefix("zero-init:") for option in options]


def test_a_killed_search_goes_on_as_if_it_had_not_been(
    tmp_path: Path, journal: Path, zinit: Zinit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zinit.runs.plots.svg", lambda figure, label: "")
    arguments = (*CONVERSATION, "-o", "prefix.layers=2", "-o", "prefix.length=2")
    assert zinit(*arguments, "--trials", 8, "--output", tmp_path / "whole").code == 0
    out, finish = tmp_path / "killed", Runner.finish
    before = len(started(journal))
    assert zinit(*arguments, "--trials", 4, "--output", out).code == 0

    def killed(self: Runner, cells: Any) -> None:
        finish(self, cells[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "finish", killed)
    assert zinit(*arguments, "--trials", 8, "--output", out).code == 130
    monkeypatch.setattr(Runner, "finish", finish)
    with (out / tune.JOURNAL).open("ab") as file:
        file.write(b'{"op_code": 5, "tor')
    (out / f"{tune.JOURNAL}.lock").touch()
    done = zinit(*arguments, "--trials", 8, "--output", out, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["best"] == record(out)["best"]
    assert options(out) == options(tmp_path / "whole")
    assert len({str(said) for said in options(out)}) == 8
    cells = [entry["cell"] for entry in started(journal)[before:]]
    assert sorted(cells) == sorted({trial["cell"] for trial in record(out)["trials"]}), "each once"
    assert zinit(*arguments, "--trials", 8, "--output", out).code == 0
    assert len(started(journal)) == before + 8
    refused = zinit(*arguments, "-o", "train.epochs=1", "--output", out)
    assert refused.code == 2
    assert "holds a search with other settings: options. Give the command" in refused.err


def test_failures_are_told_and_tried_again(
    tmp_path: Path, journal: Path, zinit: Zinit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zinit.runs.plots.svg", lambda figure, label: "")
    arguments = ("tune", "--backbone", "llama", "--task", "conversation", "--jobs", 2, "--output")
    full = (*arguments, tmp_path / "full", "--method", "full", "--metric", "accuracy", "--trials")
    done = zinit(*full, 6)
    assert done.code == 1
    assert [(t["status"], t["error"]) for t in record(tmp_path / "full")["trials"]] == [
        ("failed", "RuntimeError: a fault")
    ] * 2, "the others would fail alike"
    arguments = (*arguments[:-1], "--trials", 2, "--output")
    tried = options(tmp_path / "full")
    Path(f"{journal}.mended").touch()
    assert zinit(*full, 2).code == 0
    document = record(tmp_path / "full")
    assert options(tmp_path / "full") == tried
    assert document["best"]["value"] == max(trial["value"] for trial in document["trials"])
    log = JournalStorage(JournalFileBackend(str(tmp_path / "full" / tune.JOURNAL)))
    assert optuna.load_study(study_name=None, storage=log).direction.name == "MAXIMIZE"
    assert zinit(*arguments, tmp_path / "bitfit", "--method", "bitfit").code == 2
    begun = len(started(journal))
    assert zinit(*arguments, tmp_path / "bitfit", "--method", "bitfit").code == 2
    assert len(started(journal)) == begun, "what the settings refuse is final"
    trials = record(tmp_path / "bitfit")["trials"]
    assert [(trial["status"], trial["error"]) for trial in trials] == [("refused", "there are no bias terms.")] * 2
    assert trials[0]["settings"] == {"own": 1.0}, "it has neither K nor L"
    unknown = zinit(*arguments, tmp_path / "metric", "--metric", "bleu")
    assert unknown.code == 2
    assert "the task reports no bleu, but accuracy, loss." in (tmp_path / "metric" / "report.html").read_text()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"task": "alpaca"}, "'alpaca' keeps no part of these data to measure trials on. Name data that no figure is"),
        ({"data": "x.json"}, "'conversation' keeps no part of these data"),
        ({"task": "alpaca", "validation": ["task.evaluation_limit=0"]}, "leaves the task's data as they are: the tria"),
        ({"ranges": ["own=3"]}, "--range expects NAME=LOW:HIGH, the lower number first.*; got 'own=3'"),
        ({"ranges": ["own=0:1"]}, "--range expects"),
        ({"ranges": ["prefix.length=9:2"]}, "--range expects"),
        ({"method": "lora", "ranges": ["gates=1:2"]}, "the method 'lora' has no rate of 'gates'. It has head,"),
        ({"ranges": ["own=1:2", "own=1:3"]}, "--range own was given twice"),
        ({"ranges": ["prefix.lenth=1:2"]}, "no option named 'prefix.lenth'"),
        ({"ranges": ["prefix.length=0:2"]}, "length must be a whole number of at least 1"),
        ({"metric": "best_f1_threshold", "task": "squad", "backbone": "roberta",
          "validation": ["task.held_out_data=x"]}, "best_f1_threshold is no better the higher or the lower"),
    ],
)  # fmt: skip
def test_wrong_searches_are_refused_before_anything_runs(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ZinitError, match=message):
        tune.make_plan(**{"backbone": "llama", "task": "conversation", **said}).check()


@pytest.mark.parametrize(
    ("method", "searched"),
    [
        ("zero-init", {"own", "prefix.length", "prefix.layers"}),
        ("prefix-tuning-plus", {"own", "prefix.layers"}),
        ("excitor", {"own"}),
        ("bias-tuning", {"own"}),
    ],
)
def test_what_changes_nothing_is_not_searched(method: str, searched: set[str]) -> None:
    assert set(tune.make_plan(backbone="llama", task="conversation", method=method).space) == searched


def test_ranges_come_to_what_is_searched_anyway_or_in_its_place() -> None:
    plan = tune.make_plan(
        backbone="llama",
        task="conversation",
        ranges=["gates=0.3:30", "prefix.length=8:64", "train.learning_rate=1e-3:1e-1", "train.epochs=2:4"],
    )
    plan.check()
    assert {name: (found.low, found.high) for name, found in plan.space.items()} == {
        "gates": (0.3, 30),
        "prefix.length": (8, 64),
        "prefix.layers": (1, 4),
        "train.learning_rate": (1e-3, 1e-1),
        "train.epochs": (2, 4),
    }
    cell, said = plan.trial({"gates": 3.0, "prefix.length": 9, "train.learning_rate": 0.02})
    assert said == ("prefix.length=9", "train.learning_rate=0.02", "train.rates.gates=3")
    run = cell.resolve()
    assert (run.prefix.length, run.train.learning_rate, run.train.rates.gates) == (9, 0.02, 3.0)


def test_a_benchmarks_folder_and_a_missing_package_are_told(
    tmp_path: Path, zinit: Zinit, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench.json").write_text('{"benchmark": {"experiments": []}}')
    done = zinit(*CONVERSATION, "--output", tmp_path)
    assert (done.code, "holds a benchmark. Name another --output." in done.err) == (2, True)
    monkeypatch.setattr("zinit.ui.tune.find_spec", lambda name: None)
    done = zinit(*CONVERSATION, "--output", tmp_path)
    assert done.code == 2
    assert "zinit tune needs optuna. In zinit's source folder: pip install -e '.[tune]'" in done.err
