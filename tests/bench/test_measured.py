"""The arithmetic of `benchmarks/`: what their figures are made of."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import dynamics, forgetting, old_new, real
from zinit.bench.plan import make_benchmark
from zinit.prefix import PromptTable
from zinit.runs.config import RunConfig
from zinit.runs.settings import resolve
from zinit.runs.train import Run, build
from zinit.train.batches import load_batches
from zinit.train.loop import Stepper, ignore, run_steps
from zinit.train.plan import Plan

# --- forgetting at equal training loss ---


def test_what_is_forgotten_lies_on_the_line_where_a_loss_is_reached_first() -> None:
    curve = [(4.0, 0.1), (2.0, 0.3), (2.5, 0.9), (1.0, 1.2)]  # the loss may rise again
    assert forgetting.forgotten_at(curve, 3.0) == pytest.approx(0.2)
    assert forgetting.forgotten_at(curve, 2.0) == pytest.approx(0.3)
    assert forgetting.forgotten_at(curve, 1.75) == pytest.approx(1.05)
    with pytest.raises(ValueError, match=r"0\.5 is not reached"):
        forgetting.forgotten_at(curve, 0.5)


def test_two_runs_are_compared_at_the_lowest_loss_of_both() -> None:
    far, near = [(4.0, 0.0), (1.0, 0.6)], [(4.0, 0.0), (3.0, 0.5)]
    assert forgetting.at_equal_loss(far, near) == (3.0, pytest.approx(0.2), 0.5)
    assert forgetting.at_equal_loss(near, far) == (3.0, 0.5, pytest.approx(0.2))


def test_a_share_is_of_means_and_has_an_interval_from_five_seeds_on() -> None:
    pairs = [(0.1, 0.5), (0.2, 0.5), (0.3, 0.5), (0.1, 0.5)]
    assert forgetting.share(pairs) == (pytest.approx(0.175 / 0.5), None)
    ratio, bounds = forgetting.share([*pairs, (0.3, 0.5)])
    assert ratio == pytest.approx(0.4)
    assert bounds is not None
    low, high = bounds
    assert 0.2 <= low < 0.32 < 0.48 < high <= 0.6
    paired = [(0.2, 0.4), (0.3, 0.6), (0.1, 0.2), (0.4, 0.8), (0.5, 1.0)]
    assert forgetting.share(paired)[1] == (pytest.approx(0.5), pytest.approx(0.5))


def test_a_row_pairs_the_seeds_that_both_have() -> None:
    lora = {"0": [(4.0, 0.0), (2.0, 0.4)], "1": [(4.0, 0.0), (2.0, 0.8)], "2": [(4.0, 0.0), (2.0, 9.0)]}
    ours = {"0": [(4.0, 0.0), (2.0, 0.1)], "1": [(4.0, 0.0), (2.0, 0.2)]}
    assert forgetting.row("zero-init", ours, lora) == [
        *("zero-init", "2.000", "0.1500", "2.000", "0.1500", "0.6000", "0.25", "0, 1")
    ]
    assert forgetting.row("lora", lora, lora)[-2] == "-"


def test_seeds_that_never_came_below_the_loss_of_the_start_are_not_compared() -> None:
    lora = {"0": [(0.03, 0.0), (0.01, 0.4)], "1": [(0.03, 0.0), (0.01, 0.8)]}
    ours = {"0": [(0.03, 0.0), (0.01, 0.1)], "1": [(0.03, 0.0), (0.05, 0.3)]}
    assert forgetting.row("zero-init", ours, lora)[1:] == ["0.030", "0.2000", "0.010", "0.1000", "0.4000", "0.25", "0"]
    assert forgetting.row("zero-init", {"1": ours["1"]}, lora)[1:] == ["0.050", "0.3000", "-", "-", "-", "-", "-"]


# --- levers ---


def test_what_is_measured_of_a_host_is_kept_and_never_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamics, "OUTPUT", tmp_path / "dynamics.json")
    looked: list[str] = []

    def look(name: str) -> dict[str, float]:
        looked.append(name)
        return {"loss": len(looked)}

    experiment = make_benchmark(config_file=str(real.PLAN)).experiments[0]
    host: Any = SimpleNamespace(experiment=experiment, steps=20, start=look, lever=look)
    found: dict[str, Any] = {}
    dynamics.measure(host, ["N(0, 1)"], [], found)
    dynamics.measure(host, ["N(0, 1)"], ["K = 2", "K = 32"], found)
    assert looked == ["N(0, 1)", "K = 2", "K = 32"]
    assert json.loads(dynamics.OUTPUT.read_text()) == found
    assert found[experiment.name]["levers"] == {"K = 2": {"loss": 2}, "K = 32": {"loss": 3}}
    host.steps = 9  # a run of another length is another run; the harm before training has none
    dynamics.measure(host, ["N(0, 1)"], ["K = 2"], found)
    assert looked[3:] == ["K = 2"]
    assert found[experiment.name] == {"steps": 9, "starts": {"N(0, 1)": {"loss": 1}}, "levers": {"K = 2": {"loss": 4}}}


# --- old against new ---


def test_the_ratio_of_old_and_new_is_the_median_of_the_pairs() -> None:
    def life(*ratios: float) -> dict[str, list[dict[str, Any]]]:
        return {"new over old": [{"under": {"wall": 2.0}, "over": {"wall": 2.0 * ratio}} for ratio in ratios]}

    found = old_new.summarize([life(1.0, 1.2, 1.1), life(1.3, 1.2, 5.0)])["new over old"]["wall"]
    assert (found["median_ratio"], found["pairs"]) == (1.2, 6)
    assert found["median_by_life"] == [1.1, 1.3]
    assert found["median"] == {"under": 2.0, "over": 2.4}
    low, high = found["interval_95"]
    assert 1.0 <= low < 1.2 < high <= 5.0
    same = old_new.summarize([life(1.1, 1.1), life(1.1)])["new over old"]["wall"]
    assert same["interval_95"] == [1.1, 1.1]
    one = old_new.summarize([life(1.0, 2.0, 3.0)])["new over old"]["wall"]  # pairs differ within a life too
    assert one["interval_95"] == [1.0, 3.0]


# --- the tables on pretrained weights ---


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"zero-init": (0.2, 0.5), "zero-init-tuned": (0.4, 0.1)}, {"zero-init": 0.5, "zero-init-tuned": 0.4}),
        ({"query-gate-tuned": (0.2, 0.5), "query-gate": (0.1, 0.6)}, {"query-gate": 0.6, "query-gate-tuned": 0.5}),
        ({"zero-init": (0.2, 0.5), "zero-init-tuned": (0.9, None)}, {"zero-init": 0.5}),  # not known yet
    ],
)
def test_a_member_is_judged_by_its_best_trial_once_all_are_there(
    scores: dict[str, tuple[float | None, ...]],
    expected: dict[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experiment = make_benchmark(config_file=str(real.PLAN)).experiments[0]  # judged by F1, the higher the better
    monkeypatch.setattr(real, "OUTPUT", tmp_path)
    (tmp_path / "cells").mkdir()
    for method, found in scores.items():
        trials = [cell for cell in experiment.selection_cells() if cell.name == method]
        given = [*found, *[0.0] * (len(trials) - len(found))]
        for cell, value in zip(trials, given, strict=True):
            measured = {
                "metrics": {"base": {}, "adapted": {"f1": value}},
                "num_trainable": 1,
                "seconds": 1.0,
                "rates": {},
            }
            document = {"id": cell.id, "status": "done", "cell": cell.to_dict(), "by_settings": False, **measured}
            empty = {"counts": {}, "examples": {}, "curves": {}}
            if value is not None:
                (tmp_path / "cells" / f"{cell.id}.json").write_text(json.dumps(document | empty))
    assert real.tried(experiment) == expected


# --- where prompts start ---


def demo_run(**options: Any) -> Run:
    said = [f"{name.replace('__', '.')}={value}" for name, value in options.items()]
    config, _ = resolve(backbone="llama", options=["prefix.length=4", "train.steps=2", "train.warmup_steps=0", *said])
    assert isinstance(config, RunConfig)
    return build(config, Path(), preset=None, resume=False, on_event=ignore)


def test_prompts_start_as_what_attention_sees_of_a_training_example() -> None:
    run = demo_run(method="random-gate")  # whose prefixes would show in what later layers see
    handle, task = run.task.handle, run.task
    assert handle is not None
    longest = max(range(len(task.train_stream)), key=lambda index: task.train_stream.lengths[index])
    batch = task.collate(task.train_stream, [longest])
    with handle.disabled():
        hidden = task.model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
    layers = task.model.model.layers
    for layer in ("own", "lowest"):
        dynamics.start_at_words(run, layer)
        for number, prefix in enumerate(handle.prefixes.values()):
            place = number if layer == "own" else 0
            first = len(layers) - len(handle.prefixes)
            seen = layers[first + place].input_layernorm(hidden[first + place])[0]
            assert isinstance(prefix.prompt, PromptTable)
            nearest = torch.cdist(prefix.prompt.weight, seen, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
            torch.testing.assert_close(nearest.values, torch.zeros(4), rtol=0, atol=1e-5)
            assert len(set(nearest.indices.tolist())) == 4
    assert not any(site.module._forward_pre_hooks for site in handle.sites)


def test_a_run_is_measured_before_the_first_step_and_after_the_last(tmp_path: Path) -> None:
    (tmp_path / "known.txt").write_text("Ann lives in Bree.\n\nBob lives in Dale.\n")
    run = demo_run(method="random-gate", task__evaluation_limit=0, task__known_texts=tmp_path / "known.txt")
    with run.built.adapted.disabled():
        base = run.task.evaluate(run.accelerator).metrics["known_loss"]
    start = run.task.evaluate(run.accelerator).metrics["known_loss"]
    measure = forgetting.Measure(run, every=2)
    assert measure.curve[0][1] == pytest.approx(start - base)
    assert abs(measure.curve[0][1]) > 1e-4  # random gates do harm, or good, before any training
    stepper = Stepper(run.task, Plan.of(run.task, run.config.train, 0), run.accelerator)
    run_steps(stepper, load_batches(stepper.plan, run.task.collate, run.accelerator, start=0), [measure], start=0)
    (before, _), (after, lost) = measure.curve
    assert after < before
    assert lost == pytest.approx(run.task.evaluate(run.accelerator).metrics["known_loss"] - base)
    chosen = range(forgetting.EXAMPLES)
    sums = [run.task(run.task.collate(run.task.train_stream, [index])).item() for index in chosen]
    assert after == pytest.approx(sum(sums) / sum(run.task.train_stream.counts[index] for index in chosen), rel=1e-4)
