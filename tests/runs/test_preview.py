"""What is wrong is said before a model is loaded; what a preset asks of a larger model is scaled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import save_records, save_tiny_llama
from zinit import PrefixConfig, demo
from zinit.errors import BackboneError, ConfigError, DataError
from zinit.runs import preview
from zinit.runs import train as runs
from zinit.runs.command import command_of
from zinit.runs.config import RunConfig
from zinit.runs.presets import Preset
from zinit.runs.preview import Preview, overruled, settle
from zinit.runs.settings import resolve
from zinit.train.events import Event, Notice, Stage
from zinit.train.plan import rates_by_role


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("model"), layers=4))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_records(tmp_path_factory.mktemp("data") / "data.json"))


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(runs, "build_model", load)


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize(
    ("backbone", "task"),
    [("llama", "alpaca"), ("vit", "vtab"), ("roberta", "squad"), ("roberta", "ner"), ("clip", "base-to-novel")],
)
@pytest.mark.parametrize("name", ["missing.json", "words.docx"])
def test_every_task_refuses_its_data_before_a_model_is_loaded(
    backbone: str, task: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "words.docx").write_text("words")
    config, _ = resolve(backbone=backbone, task=task, model="some/model", data=str(tmp_path / name))
    with pytest.raises(DataError, match=name):
        runs.train_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["task.fields=question,answer"], "no field 'question'"),
        (["prefix.layers=30"], "has 4 attention layers, but layers=30 asks for more"),
        (["prefix.layers=2,9"], r"attention layers 0 to 3, but layers=\[2, 9\] asks for 9"),
        (["prefix.towers=vision_model"], "no tower 'vision_model'"),
        (["task.max_length=5000"], "task.max_length is 5000, but the model has room for 512"),
    ],
)
def test_settings_are_refused_before_the_weights_are_loaded(
    options: list[str], says: str, model: str, data: str, tmp_path: Path
) -> None:
    config, preset = resolve(backbone="llama", model=model, data=data, options=options)
    with pytest.raises((BackboneError, ConfigError, DataError), match=says):
        runs.train_run(config, tmp_path / "run", preset=preset)


@pytest.mark.usefixtures("loads_nothing")
def test_an_encoder_that_cannot_be_one_is_refused_before_anything_is_loaded(data: str, tmp_path: Path) -> None:
    said: list[Event] = []
    options: dict[str, Any] = {"task": "conversation", "method": "imagebind-llm", "model": "some/model", "data": data}
    config, _ = resolve(backbone="llama", encoder="vectors:abc", **options)
    with pytest.raises(ConfigError, match=r"--encoder vectors:1024.*got vectors:abc"):
        runs.train_run(config, tmp_path / "run", on_event=said.append)
    assert not said


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("prefix-tuning-plus", ["prefix.length=20", "prefix.layers=3"], ["prefix.length=20"]),
        ("prefix-tuning-plus", ["prefix.layers=3"], []),
        ("random-gate", ["prefix.gate_init=0.5", "prefix.length=20"], ["prefix.gate_init=0.5"]),
        (
            "prefix-tuning",
            ["prefix.gate_init=0.5", "prefix.gate=identity"],
            ["prefix.gate=identity", "prefix.gate_init=0.5"],
        ),
        ("zero-init", ["prefix.gating=false", "prefix.gate_init=0.5"], ["prefix.gate_init=0.5"]),
        ("bias-tuning", ["prefix.length=20"], ["prefix.length=20"]),
        ("zero-init", ["prefix.length=20", "prefix.gate_init=0.5"], []),
        ("lora", ["prefix.length=20"], []),
        ("random-gate", ["parts.a.length=3", "parts.b.gate_init=0.5"], ["parts.b.gate_init=0.5"]),
    ],
)
def test_what_a_method_decides_by_itself_is_said(method: str, options: list[str], says: list[str], model: str) -> None:
    config, _ = resolve(backbone="llama", method=method, model=model, data="some", options=options)
    assert overruled(config) == says


def test_no_method_is_refused_for_a_prefix_that_it_has_not(model: str, data: str) -> None:
    config, preset = resolve(backbone="llama", model=model, data=data, options=["prefix.layers=30", "method=lora"])
    assert settle(config, preset) == (config, [])


def test_a_tower_with_enough_layers_is_enough_to_go_on_and_load() -> None:
    """A task may load one tower of several. Each tower's own number is checked when the prefix is attached."""
    config, _ = resolve(backbone="clip", options=["prefix.layers=3"])
    preview = Preview.of(config)
    assert preview is not None
    counts = [len(sites) for sites in preview.towers(None)]
    assert len(counts) == 2
    too_many = resolve(backbone="clip", options=[f"prefix.layers={max(counts) + 1}"])
    with pytest.raises(BackboneError, match=r"the tower .* asks for more"):
        settle(*too_many)


@pytest.mark.parametrize("source", ["no/model/here", "some-hub-id-that-is-not"])
def test_a_model_that_cannot_be_previewed_is_left_to_loading(source: str, data: str) -> None:
    config, _ = resolve(backbone="llama", model=source, data=data)
    assert Preview.of(config) is None


# --- presets ----------------------------------------------------------------------------------------------------------


def preset_on(model: str | None, data: str | None, *options: str) -> tuple[RunConfig, list[str]]:
    return settle(*resolve(backbone="llama", preset="llama-7b", model=model, data=data, options=options))


@pytest.mark.parametrize(("layers", "scaled"), [(1, 1), (4, 4), (12, 11), (29, 27), (30, 30), (31, 30)])
def test_as_large_a_part_of_the_layers(layers: int, scaled: int, data: str, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", layers=layers, max_position_embeddings=600)
    config, notes = preset_on(str(model), data)
    assert config.prefix.layers == scaled == (max(1, round(layers * 30 / 32)) if layers < 30 else 30)
    said = [f"prefix.layers={scaled} of {layers} (the preset: 30 of 32)"] if layers < 30 else []
    assert notes == said


def test_the_demo_model_takes_the_preset_of_llama_7b() -> None:
    config, notes = preset_on(None, None, "train.epochs=1")
    assert (config.prefix.layers, config.options.max_length, config.train.warmup_epochs) == (4, 256, 0.4)
    assert [note.partition("=")[0] for note in notes] == ["train.warmup_epochs", "prefix.layers", "task.max_length"]


@pytest.mark.parametrize(
    ("option", "says"), [("prefix.layers=30", "asks for more"), ("task.max_length=512", "room for 256")]
)
def test_what_the_user_gave_is_refused_and_not_scaled(option: str, says: str) -> None:
    with pytest.raises((BackboneError, ConfigError), match=says):
        preset_on(None, None, option)


def test_a_preset_by_its_plain_name_changes_nothing(model: str, data: str) -> None:
    config, preset = resolve(backbone="llama", preset="llama-7b", model=model, data=data)
    with pytest.raises(BackboneError, match="layers=30 asks for more"):
        settle(config, str(preset))


@pytest.mark.parametrize(
    ("options", "warmup"),
    [
        (["train.epochs=3"], 2),
        (["train.epochs=2"], 0.8),
        (["train.epochs=0.5"], 0.2),
        (["train.epochs=1", "train.steps=9"], 2),
        (["train.epochs=3", "train.warmup_epochs=1"], 1),
    ],
)
def test_a_warmup_that_covers_the_run_is_scaled(options: list[str], warmup: float) -> None:
    config, preset = resolve(backbone="llama", preset="llama-7b", options=options)
    assert isinstance(preset, Preset)
    assert config.train.warmup_epochs == pytest.approx(warmup)
    assert len(preset.notes) == (warmup < 1 and "0" in f"{warmup}")


@pytest.mark.parametrize(
    ("options", "steps", "warmup_steps", "warmup_epochs", "notes"),
    [
        ([], 5000, 500, None, 0),
        (["train.steps=501"], 501, 500, None, 0),
        (["train.steps=100"], 100, 10, None, 1),
        (["train.epochs=2"], None, None, 0.2, 2),
        (["train.epochs=2", "train.warmup_epochs=1"], None, None, 1, 1),
        (["train.epochs=2", "train.steps=9", "train.warmup_steps=1"], 9, 1, None, 0),
    ],
)
def test_a_preset_in_steps_is_scaled_too(
    options: list[str], steps: int | None, warmup_steps: int | None, warmup_epochs: float | None, notes: int
) -> None:
    config, preset = resolve(
        backbone="llama", preset="math/metamathqa-llama-3b", model="some", data="some", options=options
    )
    train = config.train
    assert (train.steps, train.warmup_steps, train.warmup_epochs) == (steps, warmup_steps, pytest.approx(warmup_epochs))
    assert len(preset.notes) == notes


# --- without a preset -------------------------------------------------------------------------------------------------


def test_tokens_there_is_no_room_for_are_not_asked_for(data: str, tmp_path: Path) -> None:
    small = str(save_tiny_llama(tmp_path / "model", layers=1, max_position_embeddings=100))
    config, notes = settle(*resolve(backbone="llama", model=small, data=data))
    assert config.options.max_length == 100
    assert "task.max_length=100, which the model has room for (usually 512)" in notes
    with pytest.raises(ConfigError, match=r"task.max_length is 101, but the model has room for 100"):
        settle(*resolve(backbone="llama", model=small, data=data, options=["task.max_length=101"]))


@pytest.mark.parametrize(
    ("options", "rate", "gates", "prompts"),
    [
        ([], 3e-2, 10, 1),
        (["method=prefix-tuning"], 3e-2, 1, 3),
        (["method=gated-prefix-tuning"], 3e-2, 3, 3),
        (["method=gated-prefix-tuning", "prefix.gate=query"], 3e-2, 0.3, 3),
        (["method=gated-prefix-tuning", "prefix.parametrization=prompt"], 3e-2, 1, 1),
        (["train.learning_rate=1e-3"], 1e-3, 1, 1),
        (["train.rates.gates=7"], 9e-3 * 64 / 256, 7, 1),
        (["method=random-gate"], 3e-2, 10, 1),
        (["method=query-gate"], 3e-2, 1, 1),
        (["prefix.parametrization=prompt"], 3e-2, 1, 1),
        (["prefix.parametrization=prompt", "method=random-gate"], 3e-2, 1, 1),
        (["prefix.parametrization=prompt", "method=query-gate"], 3e-2, 0.1, 1),
        (["method=lora"], 3e-4, 1, 1),
    ],
)
def test_rates_are_those_that_were_good_on_models_of_this_size(
    options: list[str], rate: float, gates: float, prompts: float, model: str, data: str, tmp_path: Path
) -> None:
    config, preset = resolve(backbone="llama", model=model, data=data, options=options)
    run = runs.build(config, tmp_path, preset=preset, resume=False, on_event=lambda _: None)
    assert run.config.train.learning_rate == pytest.approx(rate)
    assert run.config.train.rates.factor("main", "gates") == pytest.approx(gates)
    assert run.config.train.rates.factor("main", "prompts") == prompts
    assert len([note for note in run.scaled if note.startswith("train.")]) == (rate == 3e-2)
    plain = runs.build(config, tmp_path, preset=None, resume=False, on_event=lambda _: None)
    assert plain.config == config, "as a run that goes on, or is made in Python, said it"


def test_a_seed_may_be_larger_than_numpys(model: str, data: str, tmp_path: Path) -> None:
    config, preset = resolve(backbone="llama", model=model, data=data, seed=2**63 - 1)
    assert runs.build(config, tmp_path, preset=preset, resume=False, on_event=lambda _: None).config.seed == 2**63 - 1


def test_an_encoders_gates_and_head_have_rates_of_their_own(tmp_path: Path) -> None:
    rows = [{"tokens": ["Ada", "sleeps", f"{number}"], "ner_tags": ["B-PER", "O", "O"]} for number in range(20)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    given: dict[str, Any] = {"task": "ner", "model": str(demo.roberta_path()), "data": str(tmp_path / "data.json")}
    config, preset = resolve(backbone="roberta", options=["task.max_length=32", "task.stride=8"], **given)
    run = runs.build(config, tmp_path, preset=preset, resume=False, on_event=lambda _: None)
    rates = {role: own["rate"] for role, own in rates_by_role(run.task, run.config.train).items()}
    assert rates == {"gates": pytest.approx(0.3), "prompts": pytest.approx(0.03), "head": pytest.approx(0.009)}


def test_a_large_model_trains_at_the_methods_own_rate(
    model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "SMALL", 1000)
    config, preset = resolve(backbone="llama", model=model, data=data)
    run = runs.build(config, tmp_path, preset=preset, resume=False, on_event=lambda _: None)
    assert (run.config, run.scaled) == (config, [])


def test_what_was_chosen_is_recorded_and_its_command_says_it(model: str, data: str, tmp_path: Path) -> None:
    options = ["train.steps=2", "train.batch_size=2", "train.warmup_steps=0", "method=zero-init-tuned"]
    config, preset = resolve(backbone="llama", model=model, data=data, options=options)
    said: list[Event] = []
    runs.train_run(config, tmp_path / "run", preset=preset, on_event=said.append)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    start, note = record["scaled"]
    assert start.startswith("prefix.parametrization=key_value, prefix.init_std=0.02: what was good on models of texts")
    assert note.startswith("train.learning_rate=0.03, train.rates.gates=10, train.rates.tuning=0.01: what was good on")
    notices = [event.text for event in said if isinstance(event, Notice)]
    assert [f"chosen for this model: {each}" for each in (start, note)] == notices
    assert record["preset"] is None
    assert record["rates"]["tuning"]["rate"] == pytest.approx(3e-4)
    command = command_of(RunConfig.from_dict(record["config"]), None)
    assert command is not None
    assert "train.learning_rate=0.03" in command
    assert "prefix.parametrization=key_value" in command


OWN, PROJECTED = ("key_value", 0.02), ("prompt", 1.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["method=zero-init"], OWN),
        (["method=query-gate", "prefix.length=3", "prefix.layers=2"], OWN),
        (["method=zero-init-tuned"], OWN),
        (["method=prefix-tuning"], OWN),
        (["method=gated-prefix-tuning"], OWN),
        (["prefix.parametrization=prompt"], PROJECTED),
        (["prefix.init_std=0.5"], ("prompt", 0.5)),
        (["train.learning_rate=0.01"], PROJECTED),
        (["train.rates.gates=2"], PROJECTED),
        (["method=hyper-prompts"], PROJECTED),
        (["prefix.prompts=deepshare"], PROJECTED),
        (["method=adaption-prompt-recipe"], PROJECTED),
        (["method=bias-tuning"], PROJECTED),
        (["method=excitor"], PROJECTED),
        (["method=lora"], PROJECTED),
        (["parts.early.length=2", "parts.early.layers=1"], PROJECTED),
    ],
)
def test_prompts_of_a_small_model_of_texts_are_keys_and_values_of_their_own(
    options: list[str], expected: tuple[str, float], model: str, data: str
) -> None:
    config, notes = settle(*resolve(backbone="llama", model=model, data=data, options=options))
    assert (config.prefix.parametrization, config.prefix.init_std) == expected
    assert any(note.startswith("prefix.parametrization") for note in notes) == (expected == OWN)


def test_prompts_of_a_large_model_are_projected(model: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "SMALL", 1000)
    config, _ = settle(*resolve(backbone="llama", model=model, data=data))
    assert config.prefix == PrefixConfig()


@pytest.mark.parametrize(("start", "expected"), [(OWN, OWN), (PROJECTED, PROJECTED)])
def test_a_run_that_goes_on_from_an_adapter_learns_what_it_learned(
    start: tuple[str, float], expected: tuple[str, float], model: str, data: str, tmp_path: Path
) -> None:
    options = ["train.steps=2", "train.batch_size=2", "train.warmup_steps=0", "task.evaluation_limit=0"]
    begun = [*options, f"prefix.parametrization={start[0]}", f"prefix.init_std={start[1]}"]
    config, preset = resolve(backbone="llama", model=model, data=data, options=begun)
    runs.train_run(config, tmp_path / "first", preset=preset)
    config, preset = resolve(
        backbone="llama", model=model, data=data, options=options, warm_start=str(tmp_path / "first")
    )
    runs.train_run(config, tmp_path / "second", preset=preset)
    record = json.loads((tmp_path / "second" / "run.json").read_text())
    assert (record["config"]["prefix"]["parametrization"], record["config"]["prefix"]["init_std"]) == expected


def test_an_encoder_of_images_keeps_projected_prompts(tmp_path: Path) -> None:
    config, preset = resolve(backbone="clip", model=str(demo.clip_path()), data=str(tmp_path))
    assert settle(config, preset)[0].prefix.parametrization == "prompt"


def test_a_users_own_warmup_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"warmup_epochs \(2\) must be fewer than epochs \(1\)"):
        resolve(backbone="llama", preset="llama-7b", options=["train.epochs=1", "train.warmup_epochs=2"])


def test_a_short_try_of_a_preset_trains_says_what_was_scaled_and_records_it(
    model: str, data: str, tmp_path: Path
) -> None:
    options = ["train.steps=10", "task.evaluation_limit=0", "train.batch_size=8", "prefix.length=2"]
    config, preset = resolve(backbone="llama", preset="llama-7b", model=model, data=data, options=options)
    events: list[Event] = []
    runs.train_run(config, tmp_path / "run", preset=preset, on_event=events.append)
    said = [event.text for event in events if isinstance(event, Notice)]
    [picked] = [event.text for event in events if isinstance(event, Stage) and event.text.startswith("training ")]
    assert picked == (
        "training 2 prompts in 4 of 4 layers; prompts: 256 numbers at rate 0.00225; gates: 16 numbers at rate 0.00225; "
        "10 steps, 4 of them warm-up; at most 512 tokens"
    )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["scaled"] == [
        "prefix.layers=4 of 4 (the preset: 30 of 32)",
        "train.warmup_steps=4 of 10 (the preset: 2 of 5 epochs)",
    ]
    assert [f"the preset is scaled to this run: {note}" for note in record["scaled"]] == said
    assert record["config"]["prefix"]["layers"] == 4
    assert (record["config"]["train"]["warmup_steps"], record["config"]["train"]["warmup_epochs"]) == (4, None)
    assert record["preset"] == "alpaca/llama-7b"


def test_every_preset_with_layers_says_of_how_many() -> None:
    from zinit.runs.presets import preset_names, read_preset

    for name in preset_names():
        values = read_preset(name)
        layers = values.get("prefix", {}).get("layers")
        assert not isinstance(layers, int) or values["model_layers"] >= layers


def test_the_demos_are_not_scaled() -> None:
    for backbone in ("llama", "vit", "roberta", "clip"):
        config, preset = resolve(backbone=backbone)
        assert settle(config, preset) == (config, [])
    assert demo.llama_path().is_dir()
