"""Every method through the one engine: trained, saved, loaded again, and resumed to the same bits."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.tiny import save_records, save_tiny_llama
from zinit.errors import CheckpointError, ConfigError
from zinit.methods import METHODS
from zinit.runs.config import RunConfig
from zinit.runs.evaluate import evaluate_run
from zinit.runs.settings import resolve
from zinit.runs.train import Interrupted, train_run
from zinit.serve.served import Models
from zinit.train.checkpoint import latest
from zinit.train.events import Event, Step
from zinit.ui.answers import Asking, answer_file
from zinit.ui.chat import ChatSession

OPTIONS = ("prefix.length=3", "steps=6", "batch_size=8", "micro_batch_size=4", "task.evaluation_limit=4",
           "max_new_tokens=4", "learning_rate=0.02", "warmup_steps=0", "evaluate_every=0", "save_every=2")  # fmt: skip
WITH_IMAGES = {name for name in METHODS if "context" in METHODS.fact(name, "defaults")}  # see test_image_runs.py
UNFIT = {"bitfit": "no bias terms", "head-only": "nothing to train", "logistic-regression": "nothing to train"}
FIT = sorted(set(METHODS) - set(UNFIT) - WITH_IMAGES)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": str(save_tiny_llama(folder / "model")), "data": str(save_records(folder / "data.json"))}


def configured(inputs: dict[str, str], method: str) -> RunConfig:
    return resolve(backbone="llama", options=[*OPTIONS, f"method={method}"], **inputs)[0]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}: {key}": tensor
        for name in ("adapter.safetensors", "trained.safetensors")
        if (folder / name).exists()
        for key, tensor in load_file(folder / name).items()
    }


@pytest.fixture(params=FIT)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def runs(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of each method, by its name, and what `train_run` returned beside it."""
    folder = tmp_path_factory.mktemp("runs")
    for name in FIT:
        results = train_run(configured(inputs, name), folder / name)
        (folder / f"{name}.json").write_text(json.dumps(results))
    return folder


def results_of(runs: Path, method: str) -> dict[str, Any]:
    return json.loads((runs / f"{method}.json").read_text())


def test_trained_saved_and_loaded_again(method: str, runs: Path) -> None:
    results = results_of(runs, method)
    assert results["metrics"]["adapted"]["loss"] != results["metrics"]["base"]["loss"]
    again = evaluate_run(runs / method)
    assert again["metrics"] == results["metrics"]
    of_the_end = evaluate_run(latest(runs / method))
    assert of_the_end["metrics"] == results["metrics"], "the last checkpoint has the weights of the end"
    assert "step-00000006" in of_the_end["note"]
    assert "note" not in again
    document = json.loads((runs / method / "run.json").read_text())
    assert document["method"] == method
    assert sum(tensor.numel() for tensor in weights(runs / method).values()) == results["num_trainable"]
    assert all((runs / method / name).exists() for name in document["weights"])


def test_the_frozen_model_is_the_same_for_all(runs: Path) -> None:
    frozen = {}
    for method in FIT:
        results = results_of(runs, method)
        frozen[method] = (results["metrics"]["base"], [sample["base"] for sample in results["samples"]])
    expected = frozen.pop("zero-init")
    assert frozen
    assert all(found == expected for found in frozen.values())


def test_a_stopped_run_goes_on_to_the_same_bits(
    method: str, inputs: dict[str, str], runs: Path, tmp_path: Path
) -> None:
    config = configured(inputs, method)

    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train_run(config, tmp_path / "stopped", on_event=stop)
    found = evaluate_run(tmp_path / "stopped")
    assert "step-00000003" in found["note"]
    if (runs / method / "adapter.json").exists():
        assert "step-00000003" in Models.of({"stopped": str(tmp_path / "stopped")}).get("stopped").note
    assert found["metrics"]["base"] == results_of(runs, method)["metrics"]["base"]
    assert found["metrics"]["adapted"]["loss"] not in (
        found["metrics"]["base"]["loss"], results_of(runs, method)["metrics"]["adapted"]["loss"]
    )  # fmt: skip
    train_run(config, tmp_path / "stopped", resume=True)
    whole, resumed = weights(runs / method), weights(tmp_path / "stopped")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_every_method_is_talked_to(method: str, inputs: dict[str, str], runs: Path) -> None:
    """The answers of a chat are those of the evaluation, greedy; the base's too, and a checkpoint's."""
    samples = results_of(runs, method)["samples"]
    for base, column in ((False, "adapted"), (True, "base")):
        session = ChatSession(runs / method, temperature=0, max_new_tokens=4, base=base)
        for sample in samples[:2]:
            answer = session.answer(sample["prompt"], raw=True, stream=False)
            assert answer == sample[column].strip()


def said(place: Path, *, base: bool = False) -> str:
    return ChatSession(place, temperature=0, max_new_tokens=5, base=base).answer("Say red", stream=False)


@pytest.mark.parametrize("name", ["lora", "lora/resume/step-00000004", "zero-init/resume/step-00000006"])
def test_a_file_of_questions_for_any_method_and_checkpoint(name: str, runs: Path, tmp_path: Path) -> None:
    questions = [{"prompt": "Say red"}, {"prompt": "x" * 600}, {"prompt": "Say blue", "image": "red.png"}]
    Image.new("RGB", (4, 4)).save(tmp_path / "red.png")
    questions[2]["prompt"] = "<image>Say blue"
    (tmp_path / "q.json").write_text(json.dumps(questions))
    asking = Asking(run_dir=str(runs / name), temperature=0, max_new_tokens=5)
    counts = answer_file(asking, str(tmp_path / "q.json"), str(tmp_path / "a.jsonl"))
    assert (counts["read"], counts["answered"], counts["refused"]) == (3, 1, 2)
    found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    expected = {"answer": said(runs / name), "finish_reason": "length", "tokens": 5}
    assert found[0] == {"index": 0, "question": "Say red", **expected}
    if name.startswith("lora"):  # the base, the checkpoint and the end each say something else
        answers = {
            said(runs / "lora", base=True),
            said(runs / "lora"),
            said(runs / "lora" / "resume" / "step-00000004"),
        }
        assert len(answers) == 3
    assert "the model has room for" in found[1]["error"]
    assert "takes no images" in found[2]["error"]
    with pytest.raises(ConfigError, match="exists already"):
        answer_file(asking, str(tmp_path / "q.json"), str(tmp_path / "a.jsonl"))


def test_a_prefix_is_served_from_any_checkpoint_and_another_method_is_refused(method: str, runs: Path) -> None:
    run = runs / method
    last, earlier = f"{run}/resume/step-00000006", f"{run}/resume/step-00000004"
    if not (run / "adapter.json").exists():
        for where in (str(run), last):
            with pytest.raises(ConfigError, match=f"has no prefix.*Ask it with zinit chat {where}, or zinit generate"):
                Models.of({"x": where})
        return
    models = Models.of({"last": last, "end": str(run), "earlier": earlier})
    weights = {name: served.handle.state_dict() for name, served in models.by_name.items() if served.handle}
    assert list(weights) == ["last", "end", "earlier"]
    assert all(torch.equal(weights["last"][key], tensor) for key, tensor in weights["end"].items())
    assert any(not torch.equal(weights["earlier"][key], tensor) for key, tensor in weights["end"].items())
    assert "step-00000004" in models.get("earlier").note
    assert models.get("end").note == ""


def test_a_checkpoint_is_served_on_its_own_base_only(runs: Path, tmp_path: Path) -> None:
    other, last = save_tiny_llama(tmp_path / "other", seed=1), str(latest(runs / "zero-init"))
    with pytest.raises(CheckpointError, match="made for other weights of the same shape"):
        Models.of({"x": last}, model=str(other))


def test_a_checkpoint_without_what_it_started_from_is_refused_before_the_base_is_loaded(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zinit.methods.prefix.ZeroInit.untrained", lambda self: ("prompts",))
    monkeypatch.setattr("zinit.serve.served.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    last = latest(runs / "zero-init")
    assert last is not None
    use: list[Callable[[Path], Any]] = [evaluate_run, ChatSession, lambda run: Models.of({"x": str(run)})]
    for ask in use:
        with pytest.raises(CheckpointError, match=r"not what it started from \(prompts\)\. Use its end: .*zero-init"):
            ask(last)
    stopped = tmp_path / "run"
    shutil.copytree(runs / "zero-init", stopped)
    for name in ("adapter.safetensors", "adapter.json"):
        (stopped / name).unlink()
    for ask in use:
        with pytest.raises(CheckpointError, match=r"\(prompts\)\. Let it finish: zinit train --resume"):
            ask(stopped)


@pytest.mark.parametrize("unfit", sorted(UNFIT))
def test_a_method_that_does_not_fit_says_why(unfit: str, inputs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=UNFIT[unfit]):
        train_run(configured(inputs, unfit), tmp_path / "run")


def test_damaged_weights_are_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "lora", tmp_path / "run")
    path = tmp_path / "run" / "trained.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"trained\.safetensors is damaged"):
        evaluate_run(tmp_path / "run")


def test_settings_of_a_method(inputs: dict[str, str]) -> None:
    config = resolve(backbone="llama", options=["method=lora", "method.rank=2", "alpha=3"], **inputs)[0]
    assert (config.method_options.rank, config.method_options.alpha) == (2, 3)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="rank must be a whole number"):
        resolve(backbone="llama", options=["method=lora", "method.rank=0"], **inputs)
    with pytest.raises(ConfigError, match=r"no method named 'lra'\. Did you mean 'lora'"):
        resolve(backbone="llama", options=["method=lra"], **inputs)
    with pytest.raises(ConfigError, match=r"the method .zero-init. has no option .method\.rank..*-o method=lora"):
        resolve(backbone="llama", options=["method.rank=2"], **inputs)
