"""Every setting of every section refuses every wrong type with one message that names it, and nothing else happens.

The cases are made from the fields: a new setting is tested by existing.
"""

from __future__ import annotations

import dataclasses
import math
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from pydantic import BeforeValidator

from zinit.bench.cells import Experiment, Selection
from zinit.bench.plan import BenchmarkFile, make_benchmark
from zinit.config import (
    AdapterConfig,
    ExcitorConfig,
    JsonConfig,
    PrefixConfig,
    TuningConfig,
    describe_settings,
    setting_paths,
)
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.runs.config import SECTIONS, RunConfig, plain_settings
from zinit.runs.options import parse_value, run_overrides
from zinit.runs.presets import OF_PRESETS, list_presets, read_preset
from zinit.runs.settings import resolve
from zinit.tasks import TASKS
from zinit.train.config import TrainConfig
from zinit.validation import PositiveInt, SettingType, Words

CLASSES: dict[str, type[JsonConfig]] = {
    "prefix": PrefixConfig,
    "adapter": AdapterConfig,
    "tuning": TuningConfig,
    "excitor": ExcitorConfig,
    "train": TrainConfig,
    "run": RunConfig,
    "experiment": Experiment,
    "select": Selection,
    "benchmark": BenchmarkFile,
    **{f"task {name}": TASKS.get(name).Config for name in TASKS},
    **{f"method {name}": METHODS.get(name).Config for name in METHODS},
}
REQUIRED: dict[type[JsonConfig], dict[str, Any]] = {
    AdapterConfig: {"parts": {"early": {}}},
    RunConfig: {"backbone": "llama", "task": {"name": "alpaca"}},
    Experiment: {"name": "one", "backbone": "llama"},
    BenchmarkFile: {"experiment": [{}]},
}
WRONG: dict[str, Any] = {
    "text": "not a value",
    "empty text": "",
    "bool": True,
    "int": 5,
    "zero": 0,
    "negative": -1,
    "huge": 2**70,
    "float": 1.5,
    "nan": math.nan,
    "infinity": math.inf,
    "list": [7],
    "mixed list": ["a", 1, None],
    "nested list": [["a"]],
    "empty list": [],
    "table": {"a": 1},
    "table of tables": {"a": {"b": 1}},
    "keys that are no text": {1: 2},
    "null": None,
    "object": object(),
    "newlines": "two\nlines",
    "long": "x" * 2000,
}


def settings_of(where: str) -> list[str]:
    return plain_settings() if CLASSES[where] is RunConfig else [f.name for f in dataclasses.fields(CLASSES[where])]  # pyright: ignore[reportArgumentType]


CASES = [(where, name) for where in CLASSES for name in settings_of(where)]


def may_be(hint: Any, value: Any) -> bool:
    """Whether a value is of a type's kind, by plain isinstance: bounds and choices are not looked at."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or (isinstance(hint, type) and issubclass(hint, JsonConfig) and isinstance(value, dict)):
        return True
    if origin is Annotated:
        lenient = any(isinstance(note, BeforeValidator) for note in arguments[1:])
        return may_be(arguments[0], value) or (lenient and isinstance(value, str | float | None))
    if origin in (Union, types.UnionType):
        return any(may_be(part, value) for part in arguments)
    if origin is Literal:
        return value in arguments if isinstance(value, str) else False
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(may_be(arguments[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            isinstance(key, str) and may_be(arguments[1], item) for key, item in value.items()
        )
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


@pytest.mark.parametrize(("where", "name"), CASES)
def test_a_wrong_type_is_one_message_with_the_settings_name(where: str, name: str) -> None:
    settings = CLASSES[where]
    hint = get_type_hints(settings, include_extras=True)[name]
    refused = 0
    for value in WRONG.values():
        try:
            settings.from_dict({**REQUIRED.get(settings, {}), name: value})
        except ConfigError as error:
            refused += 1
            check_message(str(error), name)
        else:
            assert may_be(hint, value), f"{settings.__name__}.{name} takes {value!r}"
    assert refused >= 5 or may_be(hint, object()), "the check is of little use here"


def choices(hint: Any) -> tuple[Any, ...]:
    own = get_args(hint) if get_origin(hint) is Literal else ()
    return own + tuple(choice for part in get_args(hint) for choice in choices(part))


NONES = [
    (where, name)
    for where, name in CASES
    if "none" in choices(get_type_hints(CLASSES[where], include_extras=True)[name])
]


@pytest.mark.parametrize(("where", "name"), NONES)
def test_a_choice_named_none_can_be_given_as_an_option(where: str, name: str) -> None:
    settings = CLASSES[where]
    made = settings.from_dict({**REQUIRED.get(settings, {}), name: parse_value("none")})
    assert getattr(made, name) == "none"


ABSURD = [10**400, -(10**400), 16**6000, 1e300, -1e300]


@pytest.mark.parametrize(("where", "name"), CASES)
def test_no_number_is_without_a_limit(where: str, name: str) -> None:
    """One that is absurdly large is refused by its type, before anything is made of that size."""
    settings = CLASSES[where]
    hint = get_type_hints(settings, include_extras=True)[name]
    for number in ABSURD:
        of_this_type = [(type(number)(5), number), ([type(number)(5)], [number])]  # what may be taken, and what not
        for value in [absurd for usual, absurd in of_this_type if may_be(hint, usual) and not may_be(hint, object())]:
            with pytest.raises(ConfigError) as error:
                settings.from_dict({**REQUIRED.get(settings, {}), name: value})
            check_message(str(error.value), name)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("prefix.length=1000000000", "[prefix] length must be a whole number of at least 1 (prompts per layer); got "
                                     "1000000000. The largest that is taken is 65,536."),
        (f"gate_init=-1{'0' * 30}", "gate_init must be a number or 'random'; got -1000000000000000000000000000000. The "
                                    "largest that is taken is 1,000,000,000."),
        (f"epochs=1{'0' * 400}", "[train] epochs must be a number above 0; got 1000000"),
        (f"epochs=1{'0' * 4999}", "[train] epochs must be a number above 0; got '1000000"),
        (f"steps=0x{'f' * 5000}", "[train] steps must be a whole number of at least 1, or none; got a whole number of "
                                  "20,000 bits. The largest that is taken is 1,000,000,000."),
        ("workers=2000", "[train] workers must be a whole number of at least 0; got 2000. The largest that is taken is "
                         "1,024."),
    ],
)  # fmt: skip
def test_a_limit_is_said_where_it_is_passed(option: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(backbone="llama", options=[option])
    assert message in str(error.value)
    assert len(str(error.value)) < 300


def check_message(text: str, name: str) -> None:
    registered = "no " in text and "named" in text  # the message of a registry, about an unknown method
    assert name in text or registered, text
    assert any(words in text for words in ("got", "must", "has no setting", "needs")) or registered, text
    assert "\n" not in text
    assert len(text) < 600


@pytest.mark.parametrize("where", CLASSES)
def test_the_constructor_checks_alike(where: str) -> None:
    settings = CLASSES[where]
    needed = REQUIRED.get(settings, {}) | ({"task": "alpaca"} if settings is RunConfig else {})
    for name in settings_of(where):
        hint = get_type_hints(settings, include_extras=True)[name]
        if may_be(hint, object()):
            continue
        with pytest.raises(ConfigError, match=rf"{name} .*got <object object"):
            settings(**{**needed, name: object()})


@pytest.mark.parametrize("where", CLASSES)
def test_defaults_are_of_their_types(where: str) -> None:
    settings = CLASSES[where]
    config = settings.from_dict(REQUIRED.get(settings, {}))
    assert settings.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("where", CLASSES)
def test_every_setting_is_described(where: str) -> None:
    for setting in describe_settings(CLASSES[where]):
        assert setting.type
        assert setting.description, f"{where}: {setting.name} is missing in the docstring's Args"
        assert "  " not in setting.description
    assert describe_settings(CLASSES[where]) or CLASSES[where].__name__ == "NoSettings"


def test_descriptions_say_type_and_default() -> None:
    found = {setting.name: setting for setting in describe_settings(TrainConfig)}
    assert found["steps"].type == "a whole number of at least 1, or none"
    assert found["mixed_precision"].type == "one of 'no', 'bf16', 'fp16'"
    assert (found["batch_size"].default, found["batch_size"].required) == (64, False)
    assert found["activation_cache"].description.startswith("folder")
    assert next(s for s in describe_settings(Experiment) if s.name == "backbone").required


# --- numbers and lists ------------------------------------------------------------------------------------------------


def test_an_int_serves_as_a_number_and_stays_one() -> None:
    assert TrainConfig(epochs=3).to_dict()["epochs"] == 3
    assert type(TrainConfig.from_dict({"epochs": 3}).epochs) is int
    with pytest.raises(ConfigError, match="epochs must be a number above 0; got True"):
        TrainConfig(epochs=True)


def test_lists_become_tuples_where_the_type_says_so() -> None:
    config = PrefixConfig.from_dict({"layers": [1, 2], "towers": ["a"]})
    assert (config.layers, config.towers) == ((1, 2), ("a",))
    experiment = Experiment.from_dict({"name": "x", "backbone": "llama", "vary": {"prefix.towers": [["a"], ["b"]]}})
    assert experiment.vary == {"prefix.towers": [["a"], ["b"]]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates(JsonConfig):
    gates: float | None = None
    layers: tuple[PositiveInt, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nested(JsonConfig):
    """What a section with a table in it looks like.

    Args:
        rates: a table.
        more: tables by name,
            on two lines.
    """

    rates: Rates = dataclasses.field(default_factory=Rates)
    more: dict[str, Rates] = dataclasses.field(default_factory=dict)
    optional: Rates | None = None
    odd: Annotated[int, Words("an odd one")] = 1


def test_tables_in_a_section() -> None:
    config = Nested.from_dict({"rates": {"gates": 0.3, "layers": [1]}, "more": {"a": {"layers": [2]}}})
    assert config.rates == Rates(gates=0.3, layers=(1,))
    assert config.more["a"].layers == (2,)
    assert Nested.from_dict(config.to_dict()) == config
    assert setting_paths(Nested) == ["rates.gates", "rates.layers", "more", "optional.gates", "optional.layers", "odd"]
    for values, message in {
        "rates": ({"rates": 3}, r"^rates must be a table of settings; got 3\.$"),
        "inside": ({"rates": {"gates": "x"}}, r"^\[rates\] gates must be a number, or none; got 'x'\.$"),
        "unknown": ({"rates": {"gate": 1}}, r"^\[rates\] Rates has no setting 'gate'\. Did you mean 'gates'\?"),
        "by name": ({"more": {"a": {"layers": [0]}}}, r"^\[more\.a\] layers must be a list of whole numbers of at le"),
        "optional": ({"optional": 3}, r"^optional must be a table of settings, or none; got 3\.$"),
        "words": ({"odd": "x"}, r"^odd must be an odd one; got 'x'\.$"),
    }.values():
        with pytest.raises(ConfigError, match=message):
            Nested.from_dict(values)
    assert {s.name: s.description for s in describe_settings(Nested)}["more"] == "tables by name, on two lines."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Careless(JsonConfig):
    """Somebody else's: its check does not call the one of `JsonConfig`."""

    width: int = 3
    words: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.width + 1 > 0


def test_settings_of_somebody_else_are_checked_too() -> None:
    assert Careless.from_dict({"words": ["a"]}).words == ["a"]
    with pytest.raises(ConfigError, match="width must be a whole number; got '3'"):
        Careless.from_dict({"width": "3"})
    with pytest.raises(ConfigError, match=r"words must be a list of texts; got 'a'\. For one, write a list: \['a'\]"):
        Careless.from_dict({"words": "a"})


def test_types_that_cannot_be_read_are_said() -> None:
    made = dataclasses.make_dataclass("Blind", [("path", "Nowhere", None)], bases=(JsonConfig,), frozen=True)
    with pytest.raises(ConfigError, match="types of the settings Blind cannot be read: name 'Nowhere'"):
        made()


# --- sources and their order ------------------------------------------------------------------------------------------


def test_option_file_preset_default(tmp_path: Path) -> None:
    """A later source wins; each has a setting that only it says."""
    (tmp_path / "run.toml").write_text('seed = 7\ndtype = "float32"\n[train]\nbatch_size = 16\nepochs = 3\n')
    config, preset = resolve(
        backbone="llama", preset="demo", config_file=str(tmp_path / "run.toml"), options=["epochs=2"], seed=9
    )
    assert preset == "alpaca/demo"
    assert (config.train.epochs, config.train.batch_size, config.dtype, config.seed) == (2, 16, "float32", 9)
    assert config.train.micro_batch_size == read_preset("alpaca/demo")["train"]["micro_batch_size"] != 8
    assert config.train.beta1 == TrainConfig().beta1


def test_all_presets_are_read() -> None:
    for name, description in list_presets().items():
        assert description
        values = read_preset(name)
        for about in OF_PRESETS:
            values.pop(about, None)
        assert RunConfig.from_dict(values).task == name.partition("/")[0]


def test_the_old_name_of_a_setting(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[train]\ntrunk_cache = "/somewhere"')
    from_file, _ = resolve(backbone="llama", config_file=str(tmp_path / "run.toml"))
    from_option, _ = resolve(backbone="llama", options=["train.trunk_cache=/somewhere"])
    in_short, _ = resolve(backbone="llama", options=["trunk_cache=/somewhere"])
    for config in (from_file, from_option, in_short):
        assert config.train.activation_cache == "/somewhere"
        assert "trunk_cache" not in config.to_dict()["train"]
        saved = config.to_dict()
        saved["train"]["trunk_cache"] = saved["train"].pop("activation_cache")
        assert RunConfig.from_dict(saved) == config
    both, _ = resolve(backbone="llama", config_file=str(tmp_path / "run.toml"), options=["activation_cache=/other"])
    assert both.train.activation_cache == "/other"


def test_options_name_settings_in_full_or_by_their_end() -> None:
    assert run_overrides(["epochs=2", "prefix.layers=[1, 2]"], task="alpaca", method="lora") == {
        "train": {"epochs": 2},
        "prefix": {"layers": [1, 2]},
    }
    assert run_overrides(["method=lora", "rank=4"], task="alpaca", method="full") == {
        "method": {"name": "lora", "rank": 4}
    }
    with pytest.raises(ConfigError, match=r"'length' is in several sections: say method\.length or prefix\.length"):
        run_overrides(["length=3"], task="alpaca", method="prompt-tuning")


def test_fields_and_names_may_be_separated_by_commas() -> None:
    config, _ = resolve(backbone="llama", options=["task.fields=a, b,c"])
    assert config.options.fields == ("a", "b", "c")


def test_a_section_is_a_line_in_the_table_and_a_field() -> None:
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    assert {section.attribute for section in SECTIONS.values()} <= fields
    everything = resolve(backbone="llama", options=["tuning.bias=true", "context=projected-image", "encoder.bgr=true"])[
        0
    ]
    tables = [name for name in everything.to_dict() if name in SECTIONS]
    assert tables == list(SECTIONS)
    assert not {*plain_settings()} & {*SECTIONS}


def test_an_experiment_without_methods_has_the_benchmarks(tmp_path: Path) -> None:
    (tmp_path / "bench.toml").write_text(
        'methods = ["lora"]\nseeds = [4]\n[[experiment]]\nname = "a"\nbackbone = "llama"\nmethods = []\nseeds = []\n'
    )
    (experiment,) = make_benchmark(config_file=str(tmp_path / "bench.toml")).experiments
    assert (experiment.methods, experiment.seeds) == (("lora",), (4,))


@pytest.mark.parametrize(
    ("option", "path", "value"),
    [
        ("prefix.towers=vision_model", ("prefix", "towers"), ("vision_model",)),
        ("prefix.towers=vision_model, text_model", ("prefix", "towers"), ("vision_model", "text_model")),
        ('prefix.towers=["vision_model"]', ("prefix", "towers"), ("vision_model",)),
        ("prefix.layers=0,2", ("prefix", "layers"), (0, 2)),
        ("prefix.layers=[0, 2]", ("prefix", "layers"), (0, 2)),
        ("prefix.layers=2", ("prefix", "layers"), 2),
        ("task.drop_classes=a,b", ("options", "drop_classes"), ("a", "b")),
    ],
)
def test_a_list_on_the_command_line_is_names_with_commas(option: str, path: tuple[str, str], value: object) -> None:
    config, _ = resolve(backbone="clip", options=[option])
    assert getattr(getattr(config, path[0]), path[1]) == value
    assert RunConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("layers", ["0,x", "2;3", ",", "²,3"])
def test_layers_that_are_no_numbers_are_refused(layers: str) -> None:
    with pytest.raises(ConfigError, match=r"\[prefix\] layers must be a count of topmost layers"):
        resolve(backbone="clip", options=[f"prefix.layers={layers}"])


@pytest.mark.parametrize("where", [where for where in CLASSES if where.startswith(("prefix", "task", "method"))])
def test_every_list_of_names_may_be_written_without_brackets(where: str) -> None:
    hints = get_type_hints(CLASSES[where], include_extras=True)
    for setting in describe_settings(CLASSES[where]):
        of = SettingType.of(hints[setting.name])
        if of.accepts(["a", "b"]) or of.accepts(["a", "b", "c"]):
            assert of.accepts("a,b") or of.accepts("a,b,c"), setting
