"""Rates chosen for every method alike: the same factors on its own rates, by role, on a part that is not reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.test_summary import benchmark, finish
from tests.tiny import save_records, save_tiny_llama
from zinit.bench.cells import Experiment, rate_options
from zinit.bench.plan import make_benchmark
from zinit.bench.runner import Runner, choose, read_cells
from zinit.bench.summary import summarise, table
from zinit.errors import ConfigError
from zinit.runs.preview import settle
from zinit.runs.settings import resolve
from zinit.train.config import RatesConfig, TrainConfig

PLAN = """
seeds = [0, 1]
methods = ["zero-init", "lora", "head-only"]
[[experiment]]
name = "chosen"
backbone = "roberta"
task = "ner"
model = "{models}/encoder"
data = "{parts}/train.conll"
metric = "f1"
options = ["task.held_out_data={data}/test.conll"]
[experiment.method_options]
zero-init = ["train.learning_rate=0.25", "train.rates.gates=8", "train.rates.head=0.5"]
lora = ["train.learning_rate=0.125"]
head-only = ["train.learning_rate=0.5"]
[experiment.select]
options = ["task.held_out_data={parts}/validation.conll"]
rates = { own = [1, 4], head = [1, 0.5] }
metric = "loss"
"""


def test_every_method_gets_the_same_factors_on_its_own_rates(tmp_path: Path) -> None:
    [experiment] = benchmark(tmp_path, PLAN).experiments
    found: dict[str, list[dict[str, float]]] = {}
    for cell in experiment.selection_cells():
        run = cell.resolve()
        rates = {role: run.train.learning_rate * run.train.rates.factor("main", role) for role in ROLES[cell.method]}
        found.setdefault(cell.method, []).append(rates)
        assert run.options.held_out_data == "{parts}/validation.conll"
    assert found == {
        "zero-init": [
            {"gates": own * 2, "prompts": own * 0.25, "head": head * 0.125} for own in (1, 4) for head in (1, 0.5)
        ],
        "lora": [{"weights": own * 0.125, "head": head * 0.125} for own in (1, 4) for head in (1, 0.5)],
        "head-only": [{"head": 0.5}, {"head": 0.25}],
    }


ROLES = {"zero-init": ("gates", "prompts", "head"), "lora": ("weights", "head"), "head-only": ("head",)}


def test_what_was_best_is_run_with_every_seed_on_other_data(tmp_path: Path) -> None:
    plan = benchmark(tmp_path, PLAN)
    [experiment] = plan.experiments
    assert choose(experiment, {}) == {}
    losses = {"zero-init": [3, 2, 1, 4], "lora": [1, 2, 3, 4], "head-only": [2, 1]}
    for trials in experiment.trials().values():
        for (cell, _), loss in zip(trials, losses[trials[0][0].method], strict=True):
            finish(tmp_path, cell, loss=loss, f1=loss)  # the f1 would choose others
    finals = list(experiment.cells(chosen=choose(experiment, {cell["id"]: cell for cell in read_cells(tmp_path)})))
    assert {cell.seed for cell in finals} == {0, 1}
    rates = {}
    for cell in finals:
        run = cell.resolve()
        assert run.options.held_out_data == "{data}/test.conll"
        rates[cell.method] = [run.train.learning_rate * run.train.rates.factor("main", r) for r in ROLES[cell.method]]
    assert rates == {"zero-init": [8, 1, 0.125], "lora": [0.125, 0.125], "head-only": [0.25]}
    for cell in finals:
        finish(tmp_path, cell, f1=1.0, drift=0.5 + cell.seed, known_loss=4.5 if cell.method == "lora" else None)
        file = tmp_path / "cells" / f"{cell.id}.json"
        file.write_text(file.read_text().replace('"base": {', '"base": {"drift": 0.0, "known_loss": 4.0, '))
    header, lines = table(summarise(plan, tmp_path))
    assert [line[header.index("trials")] for line in lines] == ["4", "4", "2"]
    assert [line[header.index("forgetting")] for line in lines] == ["1.0000", "0.5000", "1.0000"]


def test_weights_keep_their_rate_when_the_heads_changes() -> None:
    start = TrainConfig(learning_rate=0.5)
    assert rate_options(start, {"own": 1, "head": 1}) == ()
    assert rate_options(start, {"head": 2}) == ("train.rates.weights=1", "train.rates.head=2")
    assert rate_options(start, {"own": 2}) == (
        "train.learning_rate=1",
        "train.rates.weights=1",
        "train.rates.head=0.5",
    )
    said = TrainConfig(learning_rate=0.5, rates=RatesConfig(weights=0.25, gates=3))
    assert rate_options(said, {"gates": 2, "own": 3, "head": 3}) == ("train.learning_rate=1.5", "train.rates.gates=6")


def test_wrong_roles_are_refused(tmp_path: Path) -> None:
    for wrong, message in (
        ("gate = [1]", "select.rates has no role 'gate'. Did you mean 'gates'"),
        ("own = []", 'rates must be a table that maps "own" or a role'),
        ("own = [0]", 'rates must be a table that maps "own" or a role'),
    ):
        with pytest.raises(ConfigError, match=message):
            benchmark(tmp_path, PLAN.replace("own = [1, 4], head = [1, 0.5]", wrong))


def test_places_are_of_the_machine_and_no_cell_names_them(tmp_path: Path) -> None:
    plan = benchmark(tmp_path, PLAN)
    cell = next(iter(plan.experiments[0].cells()))
    here = cell.at({"models": "/m", "parts": "/p", "data": "/d"})
    assert (here.model, here.data) == ("/m/encoder", "/p/train.conll")
    assert "task.held_out_data=/d/test.conll" in here.options
    places = {"models": str(tmp_path / "m"), "data": "/d"}
    runner = Runner(plan, tmp_path / "out", places=places)
    assert runner._portable(f"there is no {tmp_path}/m/encoder") == "there is no {models}/encoder"
    assert "/m" not in json.dumps(cell.to_dict()).replace("{models}", "")


def test_a_variant_is_a_row_of_its_own_with_settings_on_top_of_its_methods(tmp_path: Path) -> None:
    said = PLAN.replace('"head-only"]\n', '"head-only", "lora-2"]\n').replace(
        "[experiment.method_options]\n", 'variants = { "lora-2" = "lora" }\n[experiment.method_options]\n'
    )
    said = said.replace("[experiment.select]\n", 'lora-2 = ["method.rank=2"]\n[experiment.select]\n')
    plan, before = benchmark(tmp_path, said), benchmark(tmp_path, PLAN)
    [experiment] = plan.experiments
    [old] = before.experiments
    assert {cell.id for cell in old.cells()} < {cell.id for cell in experiment.cells()}
    assert "variant" not in next(old.cells()).to_dict()  # finished figures of before count
    own = [cell for cell in experiment.selection_cells() if cell.name == "lora-2"]
    runs = [cell.resolve() for cell in own]
    assert [(run.method, run.method_options.rank, run.train.learning_rate) for run in runs] == [
        ("lora", 2, rate) for rate in (0.125, 0.125, 0.5, 0.5)
    ]
    for trials in experiment.trials().values():
        for place, (cell, _) in enumerate(trials):
            finish(tmp_path, cell, loss=-place if cell.name == "lora-2" else place)
    for cell in experiment.cells(chosen=choose(experiment, {cell["id"]: cell for cell in read_cells(tmp_path)})):
        finish(tmp_path, cell, f1={"zero-init": 1.0, "lora": 2.0, "lora-2": 4.0}.get(cell.name, 0.0) + cell.seed)
    rows = {row.method: row for row in summarise(plan, tmp_path)}
    assert (rows["lora"].difference, rows["lora-2"].difference) == (1, 3)
    assert list(rows["lora-2"].values) == [0, 1]
    with pytest.raises(ConfigError, match="lora-2"):
        benchmark(tmp_path, said.replace("variants = ", "# "))
    with pytest.raises(ConfigError, match="variants names 'lora', which is taken"):
        benchmark(tmp_path, said.replace('{ "lora-2" = "lora" }', '{ "lora-2" = "lora", lora = "full" }'))


def test_a_variant_can_be_named_where_other_experiments_lack_it(tmp_path: Path) -> None:
    two = PLAN + PLAN[PLAN.index("[[experiment]]") :].replace('"chosen"', '"other"').replace(
        "[experiment.method_options]", 'variants = { "lora/2" = "lora" }\n[experiment.method_options]'
    )
    (tmp_path / "plan.toml").write_text(two)

    def made(*methods: str, options: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
        found = make_benchmark(config_file=str(tmp_path / "plan.toml"), methods=methods, options=options)
        for experiment in found.experiments:
            assert ("method.rank=2" in experiment.method_options.get("lora/2", ())) == ("lora/2" in experiment.variants)
            assert all("/" not in cell.id for cell in experiment.cells())
        return {experiment.name: experiment.methods for experiment in found.experiments}

    rank = ("lora/2:method.rank=2",)
    assert made("lora/2", options=rank) == {"other": ("lora/2",)}
    assert made("lora", "lora/2", options=rank) == {"chosen": ("lora",), "other": ("lora", "lora/2")}
    with pytest.raises(ConfigError, match="no method named 'lora-3'"):
        made("lora-3", options=rank)
    with pytest.raises(ConfigError, match="no method named 'lora-3'"):
        made("lora", options=("lora-3:method.rank=3",))


def test_the_trials_of_an_earlier_grid_count(tmp_path: Path) -> None:
    before = benchmark(tmp_path, PLAN.replace("own = [1, 4]", "own = [1, 16]"))
    plan = benchmark(tmp_path, PLAN)
    for trials in [*before.experiments[0].trials().values(), *plan.experiments[0].trials().values()]:
        for cell, _ in trials:
            finish(tmp_path, cell, loss=1.0)
    rows = summarise(plan, tmp_path)
    assert {row.method: row.trials for row in rows} == {"zero-init": 6, "lora": 6, "head-only": 2}


def test_factors_are_on_the_rate_that_the_first_trial_trains_at(tmp_path: Path) -> None:
    """On a model of one's own ``zinit train`` would choose rates itself where a cell says none."""
    said = PLAN.replace('zero-init = ["train.learning_rate=0.25", "train.rates.gates=8", "train.rates.head=0.5"]\n', "")
    [experiment] = benchmark(tmp_path, said).experiments
    found = [cell for cell in experiment.selection_cells() if cell.method == "zero-init"]
    rates = [[o for o in cell.all_options() if o.startswith("train.learning_rate=")] for cell in found]
    assert all(rates)
    assert [cell.resolve().train.learning_rate for cell in found] == [0.00225, 0.00225, 0.009, 0.009]


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("zero-init", (), ("prompt", 1.0)),
        ("zero-init", ("prefix.init_std=0.5",), ("prompt", 0.5)),
        ("zero-init", ("prefix.parametrization=key_value",), ("key_value", 1.0)),
        ("hyper-prompts", (), ("prompt", 1.0)),
        ("lora", (), ("prompt", 1.0)),
    ],
)
def test_prompts_are_what_a_cell_says_whatever_suits_the_model(
    method: str, options: tuple[str, ...], expected: tuple[str, float], tmp_path: Path
) -> None:
    """On a model of one's own ``zinit train`` would choose what prompts are where a cell says nothing."""
    model, data = str(save_tiny_llama(tmp_path / "model")), str(save_records(tmp_path / "data.json"))
    experiment = Experiment(
        name="own",
        backbone="llama",
        task="alpaca",
        model=model,
        data=data,
        methods=(method,),
        options=options,
        seeds=(0,),
    )
    [cell] = experiment.cells()
    given = {"backbone": cell.backbone, "task": cell.task, "model": cell.model, "data": cell.data}
    config, _ = settle(*resolve(**given, options=cell.all_options()))
    assert (config.prefix.parametrization, config.prefix.init_std) == expected
    assert not any("parametrization=prompt" in option for option in cell.options), "its name would be another"
