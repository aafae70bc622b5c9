"""Two processes: what they disagree about is refused before the first step, and a step is that of one process."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from tests.processes import run_ranks
from tests.tiny import save_records, save_tiny_llama
from tests.train.ranks import toy
from zinit.errors import ConfigError
from zinit.runs import agreement

OPTIONS = ["prefix.length=2", "steps=2", "batch_size=4", "warmup_steps=0", "task.evaluation_limit=0"]

# What is different on rank 1, and what the message says.
DIFFERENCES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "steps": ({"options": [*OPTIONS, "steps=3"]}, ["train.steps is 2 on rank 0 and 3 on rank 1"]),
    "seed": ({"seed": 5}, ["seed is 0 on rank 0 and 5 on rank 1"]),
    "method": ({"options": [*OPTIONS, "method=lora"]}, ["method.name is 'zero-init' on rank 0 and 'lora' on rank 1"]),
    "output": ({"output": "elsewhere"}, ["--output is", "'elsewhere' on rank 1"]),
    "data": ({"data": "other.json"}, ["the hash of the examples is", "on rank 1"]),
    "model": ({"model": "other-model"}, ["the model of rank 1 is not that of rank 0", "weights"]),
    "places": ({"model": "copy-of-model", "data": "copy.json"}, ["trained"]),  # of the same content
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What rank 0 and rank 1 found."""
    folder = tmp_path_factory.mktemp("ranks")
    model, data = save_tiny_llama(folder / "model"), save_records(folder / "data.json", 20)
    save_tiny_llama(folder / "other-model", seed=1)
    shutil.copytree(model, folder / "copy-of-model")
    save_records(folder / "other.json", 21)
    shutil.copy(data, folder / "copy.json")
    cases = {}
    for name, (different, _) in DIFFERENCES.items():
        places = {k: str(folder / different[k]) for k in ("model", "data") if k in different}
        cases[name] = [{"model": str(model), "data": str(data), "options": OPTIONS}, different | places]
    (folder / "cases.json").write_text(json.dumps(cases))
    done = run_ranks("tests.train.ranks", str(folder))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (folder / "runs").iterdir()] == ["places"], "the refused leave nothing behind"
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.integration
@pytest.mark.parametrize("name", DIFFERENCES)
def test_every_rank_is_told_what_differs(found: list[dict[str, Any]], name: str) -> None:
    zero, one = (each[name] for each in found)
    assert zero == one
    for text in DIFFERENCES[name][1]:
        assert text in zero, zero


@pytest.mark.integration
def test_an_evaluation_on_unlike_data_is_refused_by_all(found: list[dict[str, Any]]) -> None:
    zero, one = (each["evaluation"] for each in found)
    assert zero == one
    assert "disagree: --data is" in zero
    assert "other.json' on rank 1" in zero


@pytest.mark.integration
def test_steps_of_two_processes_are_those_of_one(found: list[dict[str, Any]]) -> None:
    """Also where the last step of an epoch has fewer examples than there are processes. Norms show what Adam hides."""
    one = toy()
    assert len(one["losses"]) == 8
    for what in ("losses", "norms"):
        assert found[0]["toy"][what] == pytest.approx(one[what], rel=1e-5), what
    for two in found:
        assert two["toy"]["weights"][0] == pytest.approx(one["weights"][0], abs=1e-6)


def agreeing(monkeypatch: pytest.MonkeyPatch, *found: Any) -> Any:
    """A stand-in for as many processes as there are values."""
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: list(found))
    return SimpleNamespace(num_processes=len(found))


def test_a_message_groups_ranks_and_stays_short(monkeypatch: pytest.MonkeyPatch) -> None:
    many = agreeing(monkeypatch, *[{"a": 1, "b": "x" * 999 if rank == 3 else "y"} for rank in range(20)])
    with pytest.raises(ConfigError) as error:
        agreement.check_agreement(many, {})
    assert "b is 'y' on ranks 0, 1, 2, 4, 5, 6, 7, 8, ... and 'xxx" in str(error.value)
    assert "on rank 3. Launch all of them with the same arguments" in str(error.value)
    assert len(str(error.value)) < 400
    agreement.check_agreement(agreeing(monkeypatch, {"a": 1}, {"a": 1}), {})


def test_a_value_that_one_rank_lacks_is_a_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"method\.rank is None on rank 0 and 4 on rank 1"):
        agreement.check_agreement(agreeing(monkeypatch, {}, {"method.rank": 4}), {})
