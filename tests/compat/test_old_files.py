"""What the first version wrote is read, evaluated, resumed and spoken to as it was then.

The files below ``tests/fixtures/v1`` were written by version 0.1.0; how is in their ``make.py``. On the kind of
processor and with the torch that made them tensors agree bit for bit, elsewhere but for rounding.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import zinit
from tests.compat import inputs
from tests.contract.cases import CASES

V1 = Path(__file__).parents[1] / "fixtures" / "v1"
TOLERANCE = 1e-5


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


MADE_WITH = read_json(V1 / "made_with.json")
WEIGHTS = ("adapter", "trained")
# A softmax over a text's positions does not change with the bias of their scores: its gradient is rounding and no more,
# which Adam makes steps of. Only the same processor repeats them.
OF_ROUNDING = {"zero-init-roberta": {"trained/head.bias"}}
Where = Callable[[str | None], dict[str, str]]


# Where zinit has what is tried here; nothing else in this file knows.


def methods() -> list[str]:
    from zinit.methods import METHODS

    return list(METHODS)


def evaluate(run: Path, limit: int) -> dict[str, Any]:
    from zinit.runs.evaluate import evaluate_run

    return evaluate_run(run, limit=limit)


def resume(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The results, and the events on the way."""
    from zinit.runs.directory import read_run
    from zinit.runs.train import train_run

    events: list[Any] = []
    results = train_run(read_run(run)[0], run, resume=True, on_event=events.append)
    return results, [event.to_dict() for event in events]


def answer(run: Path, instruction: str, max_new_tokens: int) -> str:
    from zinit.ui.chat import ChatSession

    speaker = ChatSession(run, temperature=0, max_new_tokens=max_new_tokens)
    return speaker.answer(instruction, stream=False)


def renamed(value: Any) -> Any:
    """What was measured, under the names of today."""
    from zinit.compat import modern_results

    if isinstance(value, dict) and "frozen" in value:
        return modern_results({"metrics": value})["metrics"]
    return modern_results(value) if isinstance(value, dict) else value


def same_machine() -> bool:
    """Whether this torch rounds as the one did that wrote the files."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    vendors = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    here = [torch.__version__, *sorted(vendors), torch.backends.cpu.get_cpu_capability()]
    return here == [MADE_WITH["versions"]["torch"], *MADE_WITH["cpu"]]


def assert_same(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, of_rounding: Collection[str] = ()
) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        if same_machine():
            assert torch.equal(found[name], tensor), f"{name} differs by {(found[name] - tensor).abs().max():.2g}"
        elif name not in of_rounding:
            torch.testing.assert_close(found[name], tensor, rtol=TOLERANCE, atol=TOLERANCE)


NEW_COUNTS = ("train_also_held_out",)  # named since 0.2: both lists of the stored images hold the same pictures


def assert_alike(found: Any, expected: Any) -> None:
    """Plain values, floats but for rounding."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_alike(found[name], value)
    else:
        assert found == expected


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor
        for name in WEIGHTS
        if (run / f"{name}.safetensors").exists()
        for key, tensor in load_file(run / f"{name}.safetensors").items()
    }


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Where:
    """Model and data of a stored run, made when they are first asked for."""
    made: dict[str | None, dict[str, str]] = {None: {}}

    def find(name: str | None) -> dict[str, str]:
        if name not in made:
            made[name] = inputs.make(str(name), tmp_path_factory.mktemp("inputs") / "made")
        return made[name]

    return find


@pytest.fixture
def copied(where: Where, tmp_path: Path) -> Callable[[Path], tuple[Path, dict[str, Any]]]:
    def copy(stored: Path) -> tuple[Path, dict[str, Any]]:
        """A stored run's folder with its inputs put in, and what is expected of it."""
        expected, run = read_json(stored.with_name(f"{stored.name}.json")), tmp_path / "run"
        expected = {key: renamed(value) for key, value in expected.items()}
        shutil.copytree(stored, run)
        paths = where(expected["inputs"])
        for file in run.rglob("*.json*"):
            text = file.read_text(encoding="utf-8")
            for name, path in paths.items():
                text = text.replace(f"@{name.upper()}@", path)
            file.write_text(text, encoding="utf-8")
        return run, expected

    return copy


def stored(part: str) -> list[Any]:
    return [pytest.param(V1 / part / name, id=name) for name in MADE_WITH[part]]


def test_nothing_is_missing() -> None:
    for part in ("finished", "killed", "adapters"):
        assert sorted(path.name for path in (V1 / part).iterdir() if path.is_dir()) == MADE_WITH[part]
        assert MADE_WITH[part]
    made = {read_json(V1 / "finished" / name / "run.json")["method"] for name in MADE_WITH["finished"]}
    assert made == set(MADE_WITH["methods"])
    assert made <= set(methods())


@pytest.mark.parametrize("run", stored("finished"))
def test_a_finished_run_evaluates_as_it_did(run: Path, copied: Any) -> None:
    folder, expected = copied(run)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = evaluate(folder, expected["limit"])
    for name in NEW_COUNTS:
        found["counts"].pop(name, None)
    assert_alike(found, expected["evaluated"])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before  # only read


@pytest.mark.parametrize(
    "run", [param for param in stored("finished") if "answer" in read_json(V1 / "finished" / f"{param.id}.json")]
)
def test_a_finished_run_answers_as_it_did(run: Path, copied: Any) -> None:
    folder, expected = copied(run)
    asked = expected["answer"]
    assert asked["text"]
    assert answer(folder, asked["instruction"], asked["max_new_tokens"]) == asked["text"]


@pytest.mark.parametrize("run", stored("killed"))
def test_a_killed_run_goes_on_to_the_tensors_of_one_that_was_not(run: Path, copied: Any) -> None:
    folder, expected = copied(run)
    assert not weights(folder)
    results, events = resume(folder)
    assert [event["step"] for event in events if event["event"] == "resume"] == [expected["last_checkpoint"]]
    whole = load_file(run.with_name(f"{run.name}.safetensors"))
    assert_same(weights(folder), whole, of_rounding=OF_ROUNDING.get(run.name, ()))
    assert_alike(results["metrics"], expected["metrics"])
    assert read_json(folder / "metrics.json")["metrics"] == results["metrics"]
    done, torn = set(), 0
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            torn += 1
            continue
        if event["event"] == "step":
            done.add(str(event["step"]))
            assert_alike(event["loss"], expected["losses"][str(event["step"])])
    assert done == expected["losses"].keys()
    assert torn == expected["torn_lines"]


@pytest.mark.parametrize("adapter", stored("adapters"))
def test_an_adapter_computes_what_it_did(adapter: Path, tmp_path: Path) -> None:
    described = read_json(adapter.with_name(f"{adapter.name}.json"))
    case = next(case for case in CASES if case.name == described["case"])
    model, batch = case.build(), case.batch(case.paddings[-1] if case.paddings else "none")
    handle = zinit.load(model, adapter)
    assert handle.config == zinit.PrefixConfig.from_dict({"length": 3, **described["settings"]})
    with torch.no_grad():
        found = {"output": case.output(model, batch)}
        with handle.disabled():
            found["frozen"] = case.output(model, batch)
    assert_same(found, load_file(adapter.with_name(f"{adapter.name}.safetensors")))
    handle.save(tmp_path)
    old, new = (read_json(folder / "adapter.json") for folder in (adapter, tmp_path))
    assert {name: new[name] for name in ("backbone", "config", "model", "sha256")} == {
        name: old[name] for name in ("backbone", "config", "model", "sha256")
    }
    assert hashlib.sha256((tmp_path / "adapter.safetensors").read_bytes()).hexdigest() == old["sha256"]
