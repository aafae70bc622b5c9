"""Extractive question answering: loss, evaluation, and whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.tasks.encoder import encoder_tokenizer, save_tiny_encoder
from tests.tasks.squad import document, make, write
from zinit.config import PrefixConfig
from zinit.errors import BackboneError, ConfigError
from zinit.models.loading import load_encoder
from zinit.runs.config import RunConfig
from zinit.runs.evaluate import evaluate_run
from zinit.runs.presets import list_presets, read_preset
from zinit.runs.train import train_run
from zinit.tasks.squad.task import Squad, SquadConfig
from zinit.train.config import TrainConfig
from zinit.train.strategy import make_accelerator


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_equals_that_of_a_loop_without_padding(kind: str, side: str, tmp_path: Path) -> None:
    tokenizer = encoder_tokenizer(kind, padding_side=side)
    task = make(tmp_path, kind=kind, tokenizer=tokenizer, max_length=80)
    indices = list(range(0, len(task.train_stream), 2))
    found = task(task.collate(task.train_stream, indices))
    expected = torch.zeros(())
    for index in indices:
        window = task.train_windows[index]
        inputs = {"input_ids": torch.tensor(window.ids[None].astype(np.int64))}
        if kind == "bert":
            assert window.types is not None
            inputs["token_type_ids"] = torch.tensor(window.types[None].astype(np.int64))
        scores = task.head(task.model(**inputs).last_hidden_state)[0]
        for side_of_answer, target in enumerate((window.start, window.end)):
            expected = expected + F.cross_entropy(scores[None, :, side_of_answer], torch.tensor([target])) / 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert task.train_stream.counts == [1] * len(task.train_stream)


def test_the_head_follows_from_the_seed_and_stays_float32(tmp_path: Path) -> None:
    first, second = make(tmp_path), make(tmp_path)
    assert torch.equal(first.head.weight, second.head.weight)
    first.model.to(torch.bfloat16)
    batch = first.collate(first.train_stream, [0, 1])
    loss = first(batch)
    assert loss.dtype == first.head.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert first._scores(batch).dtype == torch.float32


def test_one_batch_can_be_learned(tmp_path: Path) -> None:
    task = make(tmp_path, document(6), version="2.0")
    optimizer = torch.optim.Adam(task.parameters(), lr=5e-3)
    batch = task.collate(task.train_stream, range(len(task.train_stream)))
    losses = []
    for _ in range(60):
        loss = task(batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4


def answered_by_hand(task: Squad) -> dict[str, tuple[str, float]]:
    """Every question by itself, one window at a time, all spans tried."""
    found = {}
    for index, question in enumerate(task.held_out_questions):
        best, null = (-np.inf, ""), np.inf
        for window in (window for window in task.held_out_windows if window.question == index):
            ids = torch.tensor(window.ids[None].astype(np.int64))
            with torch.no_grad():
                scores = task.head(task.model(input_ids=ids).last_hidden_state)[0].numpy()
            null = min(null, scores[0].sum())
            for i in range(len(window.offsets)):
                for j in range(i, min(i + task.config.max_answer, len(window.offsets))):
                    left, right = window.offsets[i, 0], window.offsets[j, 1]
                    value = scores[window.first + i, 0] + scores[window.first + j, 1]
                    if left >= 0 and right >= 0 and value > best[0]:
                        best = (value, question.context[left:right])
        found[question.id] = (best[1].strip(), float(null - best[0]))
    return found


@pytest.mark.parametrize("unanswerable", [False, True])
def test_evaluation_against_one_window_at_a_time(unanswerable: bool, tmp_path: Path) -> None:
    dev = write(tmp_path / "dev.json", document(8, unanswerable=unanswerable))
    task = make(tmp_path, document(30, unanswerable=unanswerable), held_out_data=dev, n_best=384)
    torch.nn.init.normal_(task.head.weight, std=0.3)
    expected = answered_by_hand(task)
    order = sorted(odds for _, odds in expected.values())
    threshold = (order[2] + order[3]) / 2  # a few questions are answered, the others are not
    task.config = replace(task.config, null_threshold=threshold)
    found = task.evaluate(make_accelerator(TrainConfig()))
    given = {key: "" if unanswerable and odds > threshold else text for key, (text, odds) in expected.items()}
    assert task.predictions == given
    assert list(task.null_odds.values()) == pytest.approx([odds for _, odds in expected.values()], abs=1e-4)
    assert found.counts["questions"] == len(given) == len(task.held_out_questions)
    assert found.counts["refused"] == sum(not text for text in given.values())
    assert found.counts["refused"] == (len(given) - 3 if unanswerable else 0)
    assert unanswerable == ("no_answer_f1" in found.metrics) == ("best_f1" in found.metrics)
    if unanswerable:
        assert found.metrics["best_exact_match"] >= found.metrics["exact_match"]
    else:
        assert all(given.values())
    everything = range(len(given))
    shared_out = task._answer(everything[::2]) + task._answer(everything[1::2])
    assert sorted((i, text) for i, text, _ in shared_out) == sorted(
        (i, text) for i, text, _ in task._answer(everything)
    )
    assert task.artifacts() == {"predictions.json": task.predictions, "null_odds.json": task.null_odds}
    assert task.evaluate(make_accelerator(TrainConfig()), limit=3).counts["questions"] == 3
    assert task.evaluate(make_accelerator(TrainConfig()), limit=0).metrics == {}
    for before, after in pairwise(found.samples):
        assert set(before) == set(after) == {"prompt", "expected", "output"}


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_length is 400, but the model has room for 300 tokens"):
        make(tmp_path, max_length=400)
    with pytest.raises(ConfigError, match=r"hold 16 tokens of the context .* more than task.stride=16"):
        make(tmp_path, max_length=52)
    with pytest.raises(ConfigError, match="n_best must be a whole number of at least 1; got 0"):
        SquadConfig(n_best=0)
    with pytest.raises(ConfigError, match="null_threshold must be a number; got 'x'"):
        SquadConfig(null_threshold="x")  # pyright: ignore[reportArgumentType]
    tokenizer = encoder_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="has no padding token"):
        make(tmp_path, tokenizer=tokenizer)


def test_loading_an_encoder(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "model", "bert")
    model, tokenizer = load_encoder(folder, dtype=torch.bfloat16)
    assert tokenizer.is_fast
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any("pooler" in name for name, _ in model.named_parameters())
    with pytest.raises(BackboneError, match="there is no model folder"):
        load_encoder(tmp_path / "nowhere", dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(BackboneError, match=r"lacks 16 weights of BertModel, such as encoder.layer.2"):
        load_encoder(folder, dtype=torch.float32)


def run_config(folder: Path, kind: str = "roberta", method: str = "zero-init") -> RunConfig:
    return RunConfig(
        backbone="roberta",
        task="squad",
        model=str(save_tiny_encoder(folder / "model", kind)),
        data=write(folder / "data.json", document(20)),
        method=method,
        prefix=PrefixConfig(length=4, parametrization="key_value"),
        train=TrainConfig(steps=8, batch_size=8, micro_batch_size=4, learning_rate=3e-2),
        options=SquadConfig(max_length=160, stride=16),
    )


def test_a_whole_run(tmp_path: Path) -> None:
    results = train_run(run_config(tmp_path), tmp_path / "run")
    frozen, adapted = results["metrics"]["base"], results["metrics"]["adapted"]
    assert adapted["loss"] < frozen["loss"]
    assert results["num_trainable"] == 2 * 4 * 32 * 2 + 2 * 4 + 66  # keys and values, gates, head
    assert results["counts"]["read"] == 30 == results["counts"]["train"] + results["counts"]["held_out"]
    assert {"exact_match", "f1", "has_answer_f1", "no_answer_f1", "best_f1", "best_f1_threshold"} <= set(adapted)
    assert set(results["samples"][0]) == {"prompt", "expected", "base", "adapted"}
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text())
    odds = json.loads((tmp_path / "run" / "null_odds.json").read_text())
    assert len(predictions) == results["counts"]["held_out"]
    assert predictions.keys() == odds.keys()
    assert evaluate_run(tmp_path / "run")["metrics"] == results["metrics"]
    other = evaluate_run(tmp_path / "run", data=write(tmp_path / "other.json", document(5, unanswerable=False)))
    assert other["counts"]["questions"] == 5
    assert "no_answer_f1" not in other["metrics"]["adapted"]


@pytest.mark.parametrize(
    ("method", "kind"),
    [("prefix-tuning", "roberta"), ("prompt-tuning", "roberta"), ("full", "bert"), ("head-only", "roberta"),
     ("bitfit", "bert"), ("lora", "bert")],
)  # fmt: skip
def test_every_method_can_be_compared_with(method: str, kind: str, tmp_path: Path) -> None:
    results = train_run(run_config(tmp_path, kind, method), tmp_path / "run")
    assert results["metrics"]["adapted"]["loss"] < results["metrics"]["base"]["loss"]
    assert evaluate_run(tmp_path / "run")["metrics"] == results["metrics"]


PUBLISHED = [name for name in list_presets() if name.startswith(("squad/", "ner/")) and not name.endswith("/demo")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_hold_the_published_recipes(name: str) -> None:
    """K, epochs, batch and rate of P-tuning v2."""
    values = read_preset(name)
    assert values.pop("description")
    config = RunConfig.from_dict(values)
    recipe = (config.prefix.length, config.train.epochs, config.train.batch_size, config.train.learning_rate)
    if name.startswith("squad/"):
        assert recipe == ((16, 30, 8, 5e-3) if name.endswith("v1.1") else (8, 10, 8, 5e-3))
        assert config.options.version == name[-3:]
        assert config.prefix.gating == ("p-tuning" not in name)
    else:
        assert recipe == {"3": (11, 30, 16, 3e-2), "4": (144, 80, 32, 6e-2)}[name[-1]]
        assert config.options.max_length == {"3": 152, "4": 128}[name[-1]]


def test_an_answer_is_given_where_no_answer_is_better_by_the_threshold_exactly(tmp_path: Path) -> None:
    dev = write(tmp_path / "dev.json", document(8))
    task = make(tmp_path, document(30), held_out_data=dev)
    torch.nn.init.normal_(task.head.weight, std=0.3)
    task.evaluate(make_accelerator(TrainConfig()))
    key, odds = sorted(task.null_odds.items(), key=lambda pair: pair[1])[3]
    for threshold, given in ((odds, True), (np.nextafter(odds, -np.inf), False)):
        task.config = replace(task.config, null_threshold=float(threshold))
        task.evaluate(make_accelerator(TrainConfig()))
        assert task.null_odds[key] == odds
        assert bool(task.predictions[key]) == given
