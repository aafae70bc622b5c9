"""Wrong input: one clear message, status 2, no traceback, nothing overwritten or half-made."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import QUICK, Zinit
from tests.tasks.science_qa import save
from tests.tiny import records, save_tiny_llama
from tests.tiny import zinit as zinit_process
from zinit.files import OWNER
from zinit.ui.options import SEEDS
from zinit.validation import Seed, SettingType


@pytest.fixture
def refused(zinit: Zinit, tmp_path: Path):
    """Runs a command that must be refused, and checks how."""

    def check(*arguments: object, says: list[str], output: Path | None = None) -> None:
        done = zinit(*arguments)
        assert done.code == 2, (done.code, done.out, done.err)
        assert "Traceback" not in done.err
        lines = [line for line in done.err.splitlines() if line.startswith("zinit: ")]
        assert len(lines) == 1, done.err
        for text in says:
            assert text in lines[0], lines[0]
        if output is not None:
            assert not output.exists(), "a refused run left something behind"

    return check


def train(model: Path, data: object, output: Path, *more: object) -> tuple[object, ...]:
    return ("train", "--backbone", "llama", "--model", model, "--data", data, *QUICK, "--output", output, *more)


def bad_files(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """{kind: (file, what the message says)}."""
    good = json.dumps(records(6))
    lines = [json.dumps(record) for record in records(4)]
    contents: dict[str, tuple[str, bytes, list[str]]] = {
        "empty": ("empty.json", b"", ["empty.json is empty"]),
        "no records": ("none.json", b"[]", ["none.json holds no records"]),
        "truncated": ("cut.json", good[:-20].encode(), ["cut.json, line 1", "not valid JSON"]),
        "truncated lines": ("cut.jsonl", "\n".join([*lines, lines[0][:9]]).encode(), ["cut.jsonl, line 5", "not"]),
        "an object": ("one.json", b'{"instruction": "a"}', ["one.json: expected a JSON array", "dict"]),
        "not objects": ("text.json", b'["a", "b"]', ["text.json, record 1: expected an object", "str"]),
        "no field": ("field.json", b'[{"instruction":"a","output":"b"},{"instruction":"a"}]',
                     ["field.json, record 2 has no field 'output'", "task.fields"]),
        "null field": ("null.json", b'[{"instruction":null,"output":"b"}]', ["record 1", "'instruction' is null"]),
        "number": ("number.json", b'[{"instruction":"a","output":true}]',
                   ["record 1", "'output' must be text", "bool true"]),
        "not text": ("bytes.json", b"\xff\xfe\x00\x01", ["bytes.json is not UTF-8"]),
        "git lfs": ("lfs.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["Git LFS pointer"]),
        "parquet": ("broken.parquet", b"PAR1nonsense", ["broken.parquet is not a readable Parquet file"]),
        "suffix": ("data.xml", b"<a/>", [".csv", ".parquet", "not .xml"]),
        "table": ("data.csv", b"a,b\n1,2\n", ["data.csv, record 1 has no field 'instruction'; it has a, b"]),
        "nested": ("deep.json", b"[" * 5000, ["deep.json is not valid JSON", "recursion"]),
        "long number": ("long.json", b"[" + b"9" * 5000 + b"]", ["long.json is not valid JSON", "digits"]),
        "one record": ("single.json", b'[{"instruction":"a","output":"b"}]', ["holds 1 record", "at least 2"]),
    }  # fmt: skip
    found = {}
    for kind, (name, content, says) in contents.items():
        (folder / name).write_bytes(content)
        found[kind] = (folder / name, says)
    (folder / "two").mkdir()
    for name in ("a.json", "b.json"):
        (folder / "two" / name).write_text(good)
    found["two files"] = (folder / "two", ["expected one", "a.json, b.json"])
    found["too long"] = (Path("x" * 5000), ["xxxx"])
    found["no home"] = (Path("~nobody.of.that.name/x.json"), ["there is no data file ~nobody.of.that.name/x.json"])
    found["a reader"] = (Path("json"), ["'json' is a kind of file, and no data set on the Hub"])
    found["missing"] = (folder / "nowhere.json", ["there is no data file", "nowhere.json"])
    found["hub offline"] = (Path("nobody/nothing"), ["there is no data file nobody/nothing", "Hub"])
    return found


KINDS = ["table", "nested", "long number", "too long", "no home", "a reader",
         "empty", "no records", "truncated", "truncated lines", "an object", "not objects", "no field", "null field",
         "number", "not text", "git lfs", "parquet", "suffix", "one record", "two files", "missing",
         "hub offline"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_data(kind: str, refused, model: Path, tmp_path: Path) -> None:
    files = bad_files(tmp_path)
    assert sorted(files) == sorted(KINDS)
    file, says = files[kind]
    output = tmp_path / "out" / "run"
    refused(*train(model, file, output), says=says, output=output.parent)


@pytest.mark.parametrize("folder", ["", "alpaca/"])
def test_a_file_is_no_preset(folder: str, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / folder / "mine.toml"
    file.parent.mkdir(exist_ok=True)
    file.touch()
    says = [f"'{folder}mine.toml' is a file", f"--config {folder}mine.toml"]
    refused("train", "--backbone", "llama", "--preset", f"{folder}mine.toml", says=says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--backbone", "lama"], ["no backbone named 'lama'", "Did you mean 'llama'"]),
        (["--backbone", "llama", "--task", "alpca"], ["no task named 'alpca'", "Did you mean 'alpaca'"]),
        (["--backbone", "transformers", "--task", "squad"], ["'transformers' has no embedded demo", "--model"]),
        (["--backbone", "llama", "--task", "math"], ["'math' has no embedded demo: pass --model and --data."]),
        (["--backbone", "llama", "--task", "math", "--data", "x.json"], ["'math' has no embedded demo: pass --model."]),
        (["--backbone", "llama", "--preset", "llama-7"], ["no preset named 'llama-7'", "alpaca/llama-7b"]),
        (["--backbone", "llama", "-o", "train.epoch=3"], ["no option named 'train.epoch'", "train.epochs"]),
        (["--backbone", "llama", "-o", "lenght=3"], ["no option named 'lenght'", "Did you mean 'length'"]),
        (["--backbone", "llama", "-o", "train.epochs"], ["key=value", "train.epochs"]),
        (["--backbone", "llama", "-o", "prefix.length=0"], ["length", "at least 1", "0"]),
        (["--backbone", "llama", "-o", "prefix.length=ten"], ["length", "'ten'"]),
        (["--backbone", "llama", "-o", "prefix.gate=sigmoid"], ["gate", "'tanh', 'identity'", "'sigmoid'"]),
        (["--backbone", "llama", "--method", "gated-prefix-tuning", "-o", "prefix.parametrization=matrix"],
         ["with what the method 'gated-prefix-tuning' sets by itself", "neither prompts nor a softmax"]),
        (["--backbone", "llama", "-o", "learning_rate=-1"], ["learning_rate", "-1"]),
        (["--backbone", "llama", "-o", "batch_size=0"], ["batch_size", "at least 1"]),
        (["--backbone", "llama", "-o", "batch_size=0"], ["[train] batch_size"]),
        (["--backbone", "llama", "-o", "prefix.length=0"], ["[prefix] length"]),
        (["--backbone", "llama", "-o", "max_length=2"], ["[task] max_length"]),
        (["--backbone", "llama", "-o", "method=lora", "-o", "method.rank=0"], ["[method] rank"]),
        (["--backbone", "llama", "-o", "steps=3", "-o", "warmup_steps=3"], ["[train] warmup_steps (3)"]),
        (["--backbone", "llama", "-o", "steps=3", "-o", "warmup_epochs=1"],
         ["covers the whole run of 3", "-o train.warmup_steps="]),
        (["--backbone", "llama", "-o", "dtype=int8"], ["dtype", "int8"]),
        (["--backbone", "llama", "--seed", "-3"], ["seed", "-3"]),
        (["--backbone", "llama", "-o", "max_length=2"], ["max_length", "at least 8"]),
        (["--backbone", "llama", "--config", "nowhere.toml"], ["config file nowhere.toml"]),
        (["--backbone", "llama", "--model", "somewhere/model"], ["--data"]),
        ([], ["--backbone"]),
        (["--resume"], ["--output"]),
        (["--resume", "--output", "nowhere"], ["nowhere", "no run"]),
    ],
)  # fmt: skip
def test_settings(arguments: list[str], says: list[str], refused, tmp_path: Path) -> None:
    output = tmp_path / "out"
    more = [] if "--output" in arguments or arguments == ["--resume"] else ["--output", output]
    refused("train", *arguments, *more, says=says, output=output)


def test_unknown_flag_and_command(zinit: Zinit) -> None:
    done = zinit("train", "--bakbone", "llama")
    assert done.code == 2
    assert "--backbone" in done.err
    assert zinit("trian").code == 2
    assert "Traceback" not in done.err


def test_config_file(refused, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    for text, says in [
        ("[train", ["settings.toml is not valid TOML"]),
        ("[train]\nepoch = 3", ["no setting 'epoch'", "epochs"]),
        ("[trian]\nepochs = 3", ["'trian'", "train"]),
        ("train = 3", ["train must be a table"]),
    ]:
        file.write_text(text)
        refused("train", "--backbone", "llama", "--config", file, "--output", tmp_path / "out", says=says,
                output=tmp_path / "out")  # fmt: skip


def test_model(refused, model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(*train(empty, data, output), says=[str(empty), "no config.json"], output=output)
    refused(*train(tmp_path / "nowhere", data, output), says=["there is no model folder"], output=output)
    refused(*train(Path("nobody/nothing"), data, output), says=["nobody/nothing cannot be loaded"], output=output)
    for damage in ("config.json", "model.safetensors"):
        broken = tmp_path / f"broken-{damage}"
        shutil.copytree(model, broken)
        content = (broken / damage).read_bytes()
        (broken / damage).write_bytes(content[: len(content) // 2])
        refused(*train(broken, data, output), says=[str(broken), "cannot be loaded"], output=output)


def test_more_layers_than_the_model_has(refused, model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    says = ["has 3 attention layers", "layers=30", "1 to 3"]
    refused(*train(model, data, output, "-o", "layers=30"), says=says, output=output)


def test_everything_too_long(refused, model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    refused(*train(model, data, output, "-o", "max_length=20"), says=["nothing is left", "max_length"], output=output)


def test_output_that_holds_a_run_or_something_else(
    refused, finished: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    refused(*train(model, data, finished), says=["already holds a run", "--resume"])
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    (tmp_path / "notes.txt").write_text("mine")
    refused(*train(model, data, tmp_path), says=["already holds files"])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    refused(*train(model, data, tmp_path / "notes.txt"), says=["is a file"])


@pytest.mark.parametrize("inside", ["", "run"])
def test_output_that_links_to_nowhere(inside: str, refused, model: Path, data: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "away")
    refused(*train(model, data, link / inside), says=[f"{link} links to {tmp_path / 'away'}, which is not there"])
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_no_message_advises_to_resume_what_cannot_be(zinit: Zinit, model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "away")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / OWNER).write_text('{"host": "elsewhere", "process": 1}')
    for name in ("link", "full", "taken"):
        done = zinit(*train(model, data, tmp_path / name))
        assert done.code == 2
        assert "--resume" not in done.err


@pytest.mark.parametrize("command", ["eval", "generate", "chat"])
def test_folder_that_is_no_finished_run(command: str, refused, finished: Path, tmp_path: Path) -> None:
    more = ["--prompt", "hello"] if command == "generate" else []
    refused(command, tmp_path, *more, says=[str(tmp_path), "holds no run"])
    shutil.copy(finished / "run.json", tmp_path)
    refused(command, tmp_path, *more, says=["has not finished", "zinit train --resume"])
    (tmp_path / "run.json").write_text("{")
    refused(command, tmp_path, *more, says=["run.json is damaged"])


def test_a_checkpoint_where_a_run_is_expected(refused, zinit: Zinit, finished: Path, tmp_path: Path) -> None:
    assert "checkpoint" not in zinit("push", "--help").out
    inside = next((finished / "resume").glob("step-*"))
    says = [f"{inside} is a checkpoint", f"Name its run: {finished}"]
    refused("push", inside, "me/x", says=says)
    refused("train", "--resume", "--output", inside, says=says)
    output = tmp_path / "out"
    refused("train", "--backbone", "llama", "--from", inside, "--output", output, says=says, output=output)


def test_damaged_adapter(refused, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused("generate", run, "--prompt", "hello", says=["adapter.safetensors is damaged"])
    (run / "adapter.json").write_text('{"format_version": 99}')
    refused("generate", run, "--prompt", "hello", says=["format version 99"])


def test_adapter_of_another_model(refused, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    document = json.loads((run / "run.json").read_text())
    for change, says in [
        ({"layers": 4}, ["num_layers is 4 here, but 3"]),
        ({"hidden_size": 64}, ["width is 64 here, but 32"]),
        ({"seed": 5}, ["other weights of the same shape", "key_probe"]),
    ]:
        document["config"]["model"] = str(save_tiny_llama(tmp_path / f"model-{next(iter(change))}", **change))
        (run / "run.json").write_text(json.dumps(document))
        refused(
            "generate", run, "--prompt", "hello", says=["another model" if "seed" not in change else "weights", *says]
        )


def test_prompt_longer_than_the_model_has_room_for(refused, finished: Path) -> None:
    refused("generate", finished, "--prompt", "a" * 600, says=["tokens", "room for 512"])


def test_inspect_ls_and_convert(refused, finished: Path, model: Path, tmp_path: Path) -> None:
    refused("inspect", tmp_path / "nowhere", says=["there is no model folder"])
    refused("inspect", model, "-o", "lenght=3", says=["'lenght'", "length"])
    refused("ls", "backbone", says=["'backbone'", "backbones"])
    there = tmp_path / "there"
    there.write_text("mine")
    arguments = ("--from", "zinit", "--to", "official-v1", "--model", model)
    refused("convert", finished, there, *arguments, says=["exists already"])
    assert there.read_text() == "mine"
    target = tmp_path / "new.pth"
    refused("convert", tmp_path / "nowhere", target, *arguments, says=["nowhere"], output=target)
    refused("convert", finished, target, "--from", "zinit", "--to", "pef", "--model", model, says=["'pef'", "peft"],
            output=target)  # fmt: skip


@pytest.mark.parametrize(("batch", "length"), [(10**10, 10**10), (10**30, 1)])
def test_a_step_larger_than_any_tensor(batch: int, length: int, refused) -> None:
    says = [f"on {batch} x {length} tokens cannot be estimated"]
    refused("inspect", "llama", "--train", "--batch", batch, "--length", length, says=says)


@pytest.mark.parametrize("seed", [-1, 2**63, 99999999999999999999])
def test_seeds_that_are_none(seed: int, refused, finished: Path, tmp_path: Path) -> None:
    new = ("--output", tmp_path / "out")
    for command in (
        ("generate", finished, "--prompt", "x"),
        ("chat", finished),
        ("chat", finished, "--web"),
        ("train", "--backbone", "llama", *new),
        ("bench", "--backbone", "llama", "--method", "zero-init", *new),
        ("tune", "--backbone", "llama", *new),
    ):
        says = ["seed", "of at least 0 (and below 2**63)", f"{seed}"]
        refused(*command, "--seed", seed, says=says, output=tmp_path / "out")


def test_the_largest_seed_is_one(zinit: Zinit, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text('[{"prompt": "x"}, {"prompt": "y"}]')
    asked = ("--seed", SEEDS - 1, "--max-new-tokens", 2)
    assert zinit("generate", finished, "--prompt", "x", *asked).code == 0
    done = zinit("generate", finished, "--data", tmp_path / "q.json", "--output", tmp_path / "a.jsonl", *asked)
    assert done.code == 0, done.err
    assert SettingType.of(Seed).accepts(SEEDS - 1)
    assert not SettingType.of(Seed).accepts(SEEDS)


@pytest.mark.integration
def test_a_real_process_exits_with_2(tmp_path: Path) -> None:
    done = zinit_process("train", "--backbone", "lama", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("zinit: no backbone named 'lama'")
    assert len(done.stderr.splitlines()) == 1


def test_an_option_given_twice_is_refused_unless_it_takes_several(zinit: Zinit, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "a.json"
    data.write_text(json.dumps(records(6)))
    for arguments in (
        train(model, data, tmp_path / "out", "--seed", 1, "--seed", 2),
        ("eval", tmp_path, "--data", data, "--data", data),
        ("generate", tmp_path, "--prompt", "a", "--prompt", "b"),
    ):
        done = zinit(*arguments)
        assert done.code == 2
        assert "was given 2 times, but takes one value" in " ".join(done.err.split())
    assert not (tmp_path / "out").exists()


def test_several_sources_are_read_by_tasks_of_texts_alone(zinit: Zinit, model: Path, tmp_path: Path) -> None:
    for name, count in (("a.json", 6), ("b.json", 5)):
        (tmp_path / name).write_text(json.dumps(records(count)))
    more = ("--data", tmp_path / "b.json", "--json")
    done = zinit(*train(model, tmp_path / "a.json", tmp_path / "out", *more))
    assert done.code == 0, done.err
    counts = json.loads(done.out)["counts"]
    assert (counts["read"], counts["read_source_1"], counts["read_source_2"]) == (11, 6, 5)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["config"]["data"] == [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert zinit("eval", tmp_path / "out").code == 0
    done = zinit("train", "--backbone", "vit", "--data", tmp_path, "--data", tmp_path)
    assert done.code == 2
    assert "the task 'vtab' reads one source of data; got 2" in done.err


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_language_only_run_is_shown_no_image_and_told_no_system_text(
    zinit: Zinit, finished: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    prompt = ("--prompt", "Hi") if command == "generate" else ()
    done = zinit(command, finished, *prompt, "--image", tmp_path / "a.png", "--image", tmp_path / "b.png")
    assert done.code == 2
    assert "the run is language-only: its adapter takes no images, but was given" in done.err
    assert "--method v1-multimodal" in done.err
    done = zinit(command, finished, *prompt, "--system", "Be kind.")
    assert (done.code, done.out) == (2, "")
    assert "the task 'alpaca' was trained without a place for a system text. Leave --system out." in done.err


def test_a_chat_that_has_no_place_for_a_system_text_asks_nothing_first(
    zinit: Zinit, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    monkeypatch.setattr("zinit.serve.command.listen", lambda *_, **__: pytest.fail("it listens"))
    for more in ((), ("--web",)):
        done = zinit("chat", finished, "--system", "Be kind.", *more)
        assert done.code == 2
        assert "without a place for a system text" in done.err


def test_an_expert_whose_package_is_missing(refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    model, data, output = save_tiny_llama(tmp_path / "model"), save(tmp_path / "data"), tmp_path / "run"
    options = ("--task", "science-qa", "-o", "task.images=false", "-o", 'task.experts=["ocr"]')
    refused(*train(model, data, output, *options), says=["'ocr' needs", "rapidocr", "'.[ocr]'"], output=output)
    wrong = ("--task", "science-qa", "-o", "task.experts=orc,search:a:b")
    refused(*train(model, data, output, *wrong), says=["no expert named 'orc'", "'ocr'"], output=output)
