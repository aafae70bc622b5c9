"""The guides, run as a reader would: their files written to a folder, the rest typed into Python, in order."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import zinit
from tests.processes import ROOT, Process, environment
from zinit.adapter.check import check_backbone
from zinit.backbones import BACKBONES
from zinit.bench.plan import make_benchmark
from zinit.demo import roberta_path, vit_path
from zinit.errors import BackboneError, DataError
from zinit.methods import METHODS
from zinit.methods.base import ApplyContext
from zinit.runs.build import build_model, build_task
from zinit.runs.evaluate import evaluate_run
from zinit.runs.settings import resolve
from zinit.runs.train import train_run
from zinit.tasks import TASKS


@dataclass
class Guide:
    """A document's code.

    Attributes:
        text: all of it.
        files: {name in a block's first line: the block}.
        blocks: (name, code) in order; the typed Python blocks have no name.
        commands: lines of the shell blocks.
        names: what the typed blocks have defined.
        printed: what they have printed, and what the text says that they print.
    """

    text: str
    files: dict[str, str] = field(default_factory=dict)
    blocks: list[tuple[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    printed: list[tuple[str, str]] = field(default_factory=list)

    def follow(self, stop: str = "never") -> Guide:
        """Writes the files and types the rest, in order, up to a block that holds ``stop``."""
        for name, code in self.blocks:
            if stop in code:
                break
            if name:
                Path(name).write_text(code)
            else:
                self.type(code)
        return self

    def type(self, code: str) -> None:
        """Runs a block; every ``print(...)  # text`` in it must print that."""
        claims = re.findall(r"^\s*print\(.*\)  # ([^:\n]+)", code, re.MULTILINE)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "the guide", "exec"), self.names)
        lines = out.getvalue().splitlines()
        assert len(lines) == len(claims), (lines, claims)
        self.printed += zip(lines, claims, strict=True)


def read(name: str) -> Guide:
    guide = Guide((ROOT / "docs" / name).read_text())
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", guide.text, re.MULTILINE | re.DOTALL):
        named = re.match(r"# (\S+\.\w+)\n", code)
        if named:
            assert named[1] not in guide.files
            guide.files[named[1]] = code
            guide.blocks.append((named[1], code))
        elif language == "python":
            guide.blocks.append(("", code))
        else:
            guide.commands += code.splitlines()
    return guide


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A reader's empty folder; what is registered and imported there is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (BACKBONES, TASKS, METHODS):
        monkeypatch.setattr(registry, "_where", dict(registry._all()))
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["new-backbone.md", "new-task.md", "other-libraries.md"])
def test_the_guides_are_short(name: str) -> None:
    lines = (ROOT / "docs" / name).read_text().splitlines()
    assert len(lines) < 200
    assert max(map(len, lines)) <= 130


# --- other libraries --------------------------------------------------------------------------------------------------


def test_the_guide_to_other_libraries_runs_and_checkpoints_hold_the_adapter_alone(folder: Path) -> None:
    with contextlib.suppress(ImportError):
        importlib.import_module("deepspeed")  # prints what it runs on where it is imported first
    with pytest.warns(UserWarning, match=r"weights of a PEFT adapter were trained and are frozen") as warned:
        guide = read("other-libraries.md").follow()
    assert len([w for w in warned if "zinit" in w.filename or "PEFT" in str(w.message)]) == 1
    assert [said for said, _ in guide.printed] == [claimed for _, claimed in guide.printed] != []
    first, last, saved = (load_file(folder / name / "adapter.safetensors") for name in (
        "checkpoints/checkpoint-2", "checkpoints/checkpoint-4", "adapter"))  # fmt: skip
    assert last.keys() == saved.keys() == first.keys()
    assert all(torch.equal(last[name], saved[name]) for name in saved)
    assert not any(torch.equal(first[name], saved[name]) for name in saved)
    of_trainer = load_file(folder / "checkpoints" / "checkpoint-4" / "model.safetensors")
    assert all(".zinit." in name for name in of_trainer)
    assert sum(tensor.numel() for tensor in of_trainer.values()) == sum(tensor.numel() for tensor in saved.values())


# --- a backbone -------------------------------------------------------------------------------------------------------


@pytest.fixture
def backbone(folder: Path) -> Guide:
    return read("new-backbone.md").follow()


def test_the_backbone_guide_runs_and_prints_what_it_says(backbone: Guide) -> None:
    assert len(backbone.printed) == 5
    assert [said for said, _ in backbone.printed] == [claimed for _, claimed in backbone.printed]


def test_the_adapter_has_fewer_than_25_lines(backbone: Guide) -> None:
    lines = [line for line in backbone.files["my_backbone.py"].splitlines() if line.strip() and line[0] != "#"]
    assert lines[0].startswith("from tiny_decoder")
    assert len(lines) < 25


def test_a_saved_adapter_comes_back(backbone: Guide) -> None:
    model, x = backbone.names["model"], torch.randn(2, 6, 32)
    handle = zinit.attach(model, zinit.PrefixConfig(length=3), seed=1)
    for prefix in handle.prefixes.values():
        prefix.gate.data.fill_(0.3)
    learned = model(x)
    handle.save("again")
    handle.detach()
    zinit.load(model, "again")
    assert torch.equal(model(x), learned)


def test_plain_prefix_tuning_is_refused_or_right(backbone: Guide) -> None:
    model, x = backbone.names["model"], torch.randn(2, 6, 32)
    split, rotate = backbone.names["split"], backbone.names["rotate"]
    tuning = zinit.PrefixConfig(length=3, layers=1, gating=False, separate_softmax=False)
    handle = zinit.attach(model, tuning, seed=0)
    with pytest.raises(BackboneError, match="does not support prefix tuning"):
        model(x)
    handle.detach()
    zinit.register_backbone("both", "my_backbone_both:MINE")
    assert check_backbone(model, x, backbone="both") == 3
    handle = zinit.attach(model, tuning, seed=0, backbone="both")
    layer = model.layers[2]
    tokens = handle.prefixes["layers.2"].prompt()[None].expand(2, -1, -1)
    with handle.disabled(), torch.no_grad():
        x = model.layers[:2](x)
        query = rotate(split(layer.query(x)))
        key = torch.cat([split(layer.key(tokens)), rotate(split(layer.key(x)))], dim=2).repeat_interleave(2, dim=1)
        value = torch.cat([split(layer.value(tokens)), split(layer.value(x))], dim=2).repeat_interleave(2, dim=1)
        seen = torch.cat([torch.ones(6, 3), torch.ones(6, 6).tril()], dim=1).bool()
        weights = (query @ key.mT * 8**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        expected = x + layer.out((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)
    handle.detach()
    half = zinit.PrefixConfig(length=3, layers=1, gate="identity", gate_init=0.5, separate_softmax=False)
    gated = zinit.attach(model, half, seed=0, backbone="both")
    with gated.disabled(), torch.no_grad():
        frozen = layer(x)
    with torch.no_grad():
        gated.prefixes["layers.2"].get_parameter("prompt.weight").copy_(tokens[0])
        torch.testing.assert_close(layer(x), (frozen + expected) / 2)


def test_the_other_methods_run_on_the_backbone(backbone: Guide) -> None:
    for name in ("lora", "bitfit", "bottleneck", "full"):
        model = backbone.names["Decoder"]()
        method = METHODS.get(name)(METHODS.get(name).Config())
        adapted = method.apply(model, ApplyContext(prefix=zinit.PrefixConfig(), backbone="mine", seed=0))
        adapted.model(torch.randn(2, 6, 32)).sum().backward()
        changed = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        assert changed
        if name == "lora":
            assert {part.split(".")[2] for part in changed} == {"query", "value"}


BROKEN = {
    "a closed gate must change no bit": ("return out + prefix", "return out + 1e-3 + prefix"),
    "open gates must change the output": ("return out + prefix", "return out + 0 * prefix"),
    "gets no gradient": ("*self.zinit.keys_values(", "*(x.detach() for x in self.zinit.keys_values("),
    "a prefix computed ahead must do the same": ("8**-0.5)", "8**-0.5) * (2 if self.zinit.cached_kv else 1)"),
    "a disabled adapter must change no bit": ("    return out\n", "    return out if self.zinit.active else 2 * out\n"),
    "a copy must use its own prefixes": (
        "slot, AttentionWithPrefix\n",
        "slot, AttentionWithPrefix\n        host = site.module\n"
        "        host.attend = lambda q, k, v: AttentionWithPrefix.attend(host, q, k, v)\n",
    ),
    "a saved model cannot be made": (
        "slot, AttentionWithPrefix\n",
        "slot, AttentionWithPrefix\n        site.module.note = lambda: 0\n",
    ),
    "detaching must give the model's own output": (
        "__class__ = Attention\n",
        "__class__ = Attention\n        site.module.attend = lambda q, k, v: q\n",
    ),
    "detaching must leave the model's own parts only": ("del site.module.zinit\n", "pass\n"),
}


@pytest.mark.parametrize("promise", BROKEN)
def test_the_check_finds_what_is_broken(backbone: Guide, folder: Path, promise: str) -> None:
    old, new = BROKEN[promise]
    code = backbone.files["my_backbone.py"]
    assert code.count(old) == 1
    code = code.replace(old, new)
    if "detach()" in new:
        code = code.replace("query.dtype), 8**-0.5", "query.dtype)), 8**-0.5")
    code = code.replace('= "mine"', '= "broken"')
    (folder / "broken.py").write_text(code)
    zinit.register_backbone("broken", "broken:MINE")
    with pytest.raises(BackboneError, match=f"'broken' on Decoder: .*{promise}"):
        check_backbone(backbone.names["Decoder"](), torch.randn(2, 6, 32), backbone="broken")


def test_the_check_finds_a_gate_that_one_softmax_ignores(backbone: Guide, folder: Path) -> None:
    code = backbone.files["my_backbone_both.py"]
    gated = "return own + prefix.toward(query, own, shared) if prefix.config.gating else shared"
    assert code.count(gated) == 1
    (folder / "ungated.py").write_text(code.replace(gated, "return shared").replace('= "both"', '= "ungated"'))
    zinit.register_backbone("ungated", "ungated:MINE")
    with pytest.raises(BackboneError, match="in one softmax with the words too, a closed gate must change no bit"):
        check_backbone(backbone.names["Decoder"](), torch.randn(2, 6, 32), backbone="ungated")


def test_what_the_backbone_guide_ships_is_a_table_that_names_its_object(backbone: Guide) -> None:
    entry = tomllib.loads(backbone.files["pyproject.toml"])["project"]["entry-points"]["zinit.backbones"]
    assert entry == {"mine": "my_backbone:MINE"}
    assert BACKBONES.get("mine").name == "mine"


# --- a task -----------------------------------------------------------------------------------------------------------

PYTHON_API = "train_run("


def settings(*options: str) -> Any:
    return resolve(config_file="sentences.toml", model=str(roberta_path()), data="feelings.jsonl", options=options)[0]


@pytest.fixture
def task(folder: Path) -> Guide:
    """The guide's files and data, and its task registered."""
    guide = read("new-task.md").follow(stop=PYTHON_API)
    for name, code in guide.files.items():
        (folder / name).write_text(code)
    zinit.register_task("sentences", "sentences:Sentences")
    return guide


def test_the_task_guide_runs_and_prints_what_it_says(folder: Path) -> None:
    guide = read("new-task.md").follow()
    assert [said for said, _ in guide.printed] == ["True True", "2834 300 60"]
    assert [said for said, _ in guide.printed] == [claimed for _, claimed in guide.printed]
    assert 4 * (5 * 128 + 4) + 2 * 128 + 2 == 2834
    code = [line for line in guide.files["sentences.py"].splitlines() if line.strip() and line[0] != "#"]
    assert len(code) < 90
    results = evaluate_run("runs/python", data="more.jsonl")
    assert results["counts"]["read"] == results["counts"]["held_out"] == 50
    assert results["metrics"]["adapted"]["accuracy"] > 0.8


QUICK = ("train.steps=2", "train.warmup_steps=0", "train.evaluate_every=0", "train.save_every=0", "task.held_out=40")


@pytest.mark.parametrize("method", sorted(METHODS.shipped))
def test_every_method_trains_the_task(task: Guide, method: str) -> None:
    encoder = [f"encoder.source={vit_path()}"] if "context" in METHODS.fact(method, "defaults") else []
    # PEFT's own know other models; they name what runs here.
    refused = {"adaption-prompt": "adaption-prompt-recipe", "peft-prefix-tuning": "method=prefix-tuning"}
    if method in refused:
        with pytest.raises(zinit.ConfigError, match=refused[method]):
            train_run(settings(f"method={method}", *QUICK), "run")
        return
    results = train_run(settings(f"method={method}", *encoder, *QUICK), "run")
    frozen, adapted = results["metrics"]["base"], results["metrics"]["adapted"]
    assert adapted["loss"] != frozen["loss"]
    assert 0 <= adapted["accuracy"] <= 1
    if method == "logistic-regression":
        assert adapted["accuracy"] > 0.6
    if method in ("zero-init", "lora"):  # what was saved is what was trained
        assert evaluate_run("run")["metrics"]["adapted"] == pytest.approx(adapted, rel=1e-4)


def build(*options: str, **known: Any) -> Any:
    config = settings("method=head-only", *options)
    return build_task(config, build_model(config, torch.device("cpu")), **known)


def test_the_task_keeps_the_contract(task: Guide, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build()
    counts = made.data_report()
    assert counts["read"] == counts["train"] + counts["held_out"] + counts["train_skipped_also_held_out"] == 300
    assert not {tuple(ids) for ids, _ in made.parts["train"]} & {tuple(ids) for ids, _ in made.parts["held_out"]}
    assert made.labels == ["bad", "good"]
    batch = made.collate(made.train_stream, [0, 3])
    assert all(torch.equal(tensor, batch[name]) for name, tensor in made.collate(made.train_stream, [0, 3]).items())
    one, both = made(made.collate(made.train_stream, [0])), made(made.collate(made.train_stream, [0, 1]))
    torch.testing.assert_close(both, one + made(made.collate(made.train_stream, [1])))
    assert (both.shape, both.dtype) == ((), torch.float32)
    assert made.fingerprint() == build().fingerprint() != build("seed=1").fingerprint()

    class Share:
        num_processes = 2

        def __init__(self, index: int) -> None:
            self.process_index = index

    shares: list[Any] = []
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: shares.extend(mine) or shares)
    with pytest.raises(KeyError):  # alone it has half of the answers
        made.evaluate(Share(0))
    together = made.evaluate(Share(1)).metrics
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: mine)
    alone = Share(0)
    alone.num_processes = 1
    assert together == made.evaluate(alone).metrics
    (folder / "odd.jsonl").write_text('{"text": "The song was so-so.", "label": "middling"}\n')
    with pytest.raises(DataError, match=r"not trained: \['middling'\]. Known: \['bad', 'good'\]"):
        build("task.held_out_data=odd.jsonl", labels=["bad", "good"], train=False)
    with pytest.raises(zinit.ConfigError, match="the task 'sentences' has no embedded demo: pass --model and --data"):
        resolve(config_file="sentences.toml")


def run_commands(guide: Guide, folder: Path, change: dict[str, str]) -> str:
    """The guide's shell block, with what ``pip install -e .`` would have written about the entry point."""
    project = tomllib.loads(guide.files["pyproject.toml"])["project"]
    information = folder / "site" / f"{project['name']}-{project['version']}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1\n")
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {where}" for name, where in entries.items()))
    ]
    (information / "entry_points.txt").write_text("\n".join(lines))
    script = "\n".join(guide.commands)
    for old, new in change.items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    environ = environment()
    environ["PYTHONPATH"] = os.pathsep.join([environ["PYTHONPATH"], str(folder / "site"), str(folder)])
    find_model, *commands = script.splitlines()
    find_model = f'set -e\npython() {{ "{sys.executable}" "$@"; }}\n{find_model}\nprintf %s "$MODEL"'
    model = subprocess.run(["bash", "-c", find_model], env=environ, capture_output=True, text=True, check=True).stdout
    printed = []
    for command in commands:
        program, *arguments = shlex.split(command.replace("$MODEL", model), comments=True)
        assert program == "zinit"
        done = Process("tests.docs.installed", *arguments, more=environ).done(400)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    return "".join(printed)


def test_the_benchmark_of_the_task_guide_is_complete(task: Guide) -> None:
    assert [line.split()[1] for line in task.commands[1:]] == ["train", "eval", "bench"]
    benchmark = make_benchmark(config_file="bench.toml", model=str(roberta_path()), data="feelings.jsonl")
    benchmark.check()
    cells = [cell.command() for experiment in benchmark.experiments for cell in experiment.cells()]
    assert len(cells) == 5
    assert sum("learning_rate=1e-3" in cell and "method=full" in cell for cell in cells) == 1


@pytest.mark.integration
@pytest.mark.slow
def test_all_commands_of_the_task_guide_run(task: Guide, folder: Path) -> None:
    """With fewer steps than the guide's, and the methods that differ most."""
    quick = " ".join(f"-o {option}" for option in QUICK[:-1])
    text = (folder / "bench.toml").read_text()
    for old, new in {'"train.epochs=6"': '"train.epochs=1"', '"lora", "full", "head-only", ': ""}.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    text, count = re.subn(r"method_options = \{(zero-init = [^\]]*\]).*\}", r"method_options = {\1}", text)
    assert count == 1
    (folder / "bench.toml").write_text(text)
    out = run_commands(task, folder, {"--output runs/first": f"{quick} --output runs/first"})
    assert "60 held-out examples" in out
    assert "50 held-out examples" in out
    summary = (folder / "runs" / "bench" / "summary.md").read_text()
    assert all(method in summary for method in ("zero-init", "logistic-regression"))
