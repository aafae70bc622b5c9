"""The record and the results of a run: written with today's words, read whatever version wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zinit.runs.record import Record, Results

OLD_RESULTS = {
    "metrics": {"frozen": {"loss": 3.5}, "adapted": {"loss": 1.5}},
    "baseline": "the model as it was",
    "seed": 7,
    "counts": {"held_out": 4},
    "samples": [{"prompt": "Where?", "expected": "Here.", "frozen": "There.", "adapted": "Here."}],
    "steps": 20,
    "seconds": 12.5,
    "num_trainable": 100,
}


def test_results_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(OLD_RESULTS))
    found = Results.read(tmp_path)
    assert found.metrics == {"base": {"loss": 3.5}, "adapted": {"loss": 1.5}}
    assert found.samples[0]["base"] == "There."
    document = found.to_dict()
    assert list(document) == list(OLD_RESULTS)
    assert "frozen" not in json.dumps(document["metrics"])
    assert Results.from_dict(document) == found


@pytest.mark.parametrize("text", [None, "", '{"metrics": {"base"', "[]"])
def test_results_that_are_not_there_or_torn(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "metrics.json").write_text(text)
    assert Results.read(tmp_path) == Results()


def test_results_of_a_run_that_is_not_finished_say_nothing_of_its_end() -> None:
    document = Results(metrics={"base": {}}, seed=0).to_dict()
    assert list(document) == ["metrics", "baseline", "seed", "counts", "samples"]


def test_a_record_round_trips_and_may_lack_fields(tmp_path: Path) -> None:
    record = Record(backbone="llama", seed=3, weights=[], models={"encoder": {"class": "X"}})
    assert Record.from_dict(record.to_dict()) == record
    assert "models" not in Record().to_dict(), "only where a task has further models"
    assert Record.from_dict({"backbone": "vit", "of a later version": 1}).backbone == "vit"
    assert Record.from_dict({}).weights == ["adapter.json"], "runs of the first version had no list"
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="it holds list, not named values"):
        Record.read(tmp_path)
