"""What each command does when the input is right."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import QUICK, Zinit
from tests.processes import environment
from tests.tiny import save_tiny_llama


def test_a_run_directory_holds_everything(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    expected = {"adapter.safetensors", "adapter.json", "run.json", "metrics.json", "log.jsonl", "report.html", "resume"}
    assert names == expected | {"examples.json", "README.md"}
    assert "zinit train" in (finished / "README.md").read_text()
    run = json.loads((finished / "run.json").read_text())
    assert run["config"]["train"]["steps"] == 4
    assert run["seed"] == 0
    assert {"zinit", "torch", "transformers"} <= run["versions"].keys()
    assert len(run["fingerprint"]) == 64
    counts = run["counts"]
    assert counts["read"] == 40 == counts["train"] + counts["held_out"]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["metrics"]["base"].keys() == metrics["metrics"]["adapted"].keys()
    assert metrics["metrics"]["adapted"]["loss"] != metrics["metrics"]["base"]["loss"]
    assert {"instruction", "prompt", "expected", "base", "adapted"} == metrics["samples"][0].keys()
    assert metrics["samples"][0]["instruction"].startswith("Say ")
    events = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4]
    gates = [event for event in events if event["event"] == "gates"]
    assert all(gate == 0.0 for row in gates[0]["gates"].values() for gate in row)
    assert all(gate != 0.0 for row in gates[-1]["gates"].values() for gate in row)
    assert len(next(iter(gates[0]["gates"].values()))) == 4


def test_train_prints_one_json_document(zinit: Zinit, model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = zinit("train", "--backbone", "llama", "--model", model, "--data", data, *QUICK, "--output", output, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["output"] == str(output)
    assert document["steps"] == 4


def test_train_prints_frozen_beside_adapted_with_counts_and_seed(
    zinit: Zinit, model: Path, data: Path, tmp_path: Path
) -> None:
    done = zinit("train", "--backbone", "llama", "--model", model, "--data", data, *QUICK, "--output", tmp_path / "r",
                 "--seed", 5)  # fmt: skip
    assert done.code == 0, done.err
    for text in ("base", "adapted", "perplexity", "exact_match", "rouge_l", "4 held-out examples", "seed 5"):
        assert text in done.out


def test_the_same_seed_gives_the_same_adapter(
    zinit: Zinit, model: Path, data: Path, finished: Path, tmp_path: Path
) -> None:
    arguments = ("train", "--backbone", "llama", "--model", model, "--data", data, *QUICK)
    assert zinit(*arguments, "--output", tmp_path / "same").code == 0
    assert zinit(*arguments, "--output", tmp_path / "other", "--seed", 1).code == 0
    expected = load_file(finished / "adapter.safetensors")
    same, other = (load_file(tmp_path / name / "adapter.safetensors") for name in ("same", "other"))
    assert all(torch.equal(same[name], value) for name, value in expected.items())
    assert not all(torch.equal(other[name], value) for name, value in expected.items())


def test_settings_come_from_preset_then_file_then_options(
    zinit: Zinit, model: Path, data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        "seed = 9\n[prefix]\nlength = 4\nlayers = 2\n"
        "[train]\nsteps = 2\nwarmup_steps = 0\nbatch_size = 4\n[task]\nevaluation_limit = 0\n"
    )
    done = zinit("train", "--backbone", "llama", "--preset", "llama-7b", "--config", file, "--model", model,
                 "--data", data, "-o", "prefix.length=2", "--output", tmp_path / "r", "--json")  # fmt: skip
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "r" / "run.json").read_text())["config"]
    assert (config["prefix"]["length"], config["prefix"]["layers"], config["seed"]) == (2, 2, 9)
    assert config["train"]["learning_rate"] == 2.25e-3, "the preset's"
    assert config["train"]["clip_norm"] is None, "the preset's"
    assert config["train"]["batch_size"] == 4


def test_eval_agrees_with_the_run(zinit: Zinit, finished: Path) -> None:
    done = zinit("eval", finished, "--json")
    assert done.code == 0, done.err
    expected = json.loads((finished / "metrics.json").read_text())["metrics"]
    found = json.loads(done.out)["metrics"]
    for column in ("base", "adapted"):
        assert found[column] == pytest.approx(expected[column], rel=1e-6)


def test_eval_on_other_data(zinit: Zinit, finished: Path, data: Path) -> None:
    done = zinit("eval", finished, "--data", data, "--limit", 0, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["counts"]["held_out"] == 40


def test_generate_streams_and_prints_json(zinit: Zinit, finished: Path) -> None:
    arguments = ("generate", finished, "--prompt", "Say red", "--max-new-tokens", 8, "--temperature", 0)
    document = json.loads(zinit(*arguments, "--json").out)
    assert zinit(*arguments).out.strip() == document["answer"]
    frozen = json.loads(zinit(*arguments, "--json", "--frozen").out)
    assert frozen["frozen"]
    sampled = ("generate", finished, "--prompt", "Say red", "--max-new-tokens", 8, "--temperature", 5, "--json")
    assert zinit(*sampled, "--seed", 1).out == zinit(*sampled, "--seed", 1).out
    assert zinit(*sampled, "--seed", 1).out != zinit(*sampled, "--seed", 2).out


def test_chat_keeps_the_turns(zinit: Zinit, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zinit.ui.chat as module

    seen: list[str] = []
    complete = module.ChatSession._complete

    def spy(self: module.ChatSession, ids: list[int], images: list[Any], stream: bool) -> str:
        seen.append(self.tokenizer.decode(ids))
        return complete(self, ids, images, stream)

    monkeypatch.setattr(module.ChatSession, "_complete", spy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\nsecond\n/new\nthird\n/quit\nnever\n"))
    done = zinit("chat", finished, "--max-new-tokens", 4)
    assert done.code == 0, done.err
    assert len(seen) == 3
    assert "first" in seen[1]
    assert "second" in seen[1]
    assert seen[1].count("### Response:") == 2
    assert "first" not in seen[2]
    assert seen[2].endswith("### Instruction:\nthird\n\n### Response:")


def test_inspect_counts_without_weights(zinit: Zinit, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "no-weights"
    folder.mkdir()
    (folder / "config.json").write_text((model / "config.json").read_text())
    document = json.loads(zinit("inspect", folder, "-o", "prefix.length=5", "-o", "layers=2", "--json").out)
    assert document["num_trainable"] == 2 * (5 * 32 + 4)
    assert [site["adapted"] for site in document["sites"]] == [False, True, True]
    text = zinit("inspect", folder).out
    assert "model.layers.0.self_attn" in text


def test_inspect_llama_7b(zinit: Zinit, tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    document = json.loads(zinit("inspect", tmp_path, "-o", "length=10", "-o", "layers=30", "--json").out)
    assert document["num_parameters"] == 6_738_415_616
    assert document["num_trainable"] == 1_229_760


@pytest.mark.parametrize(("kind", "name"), [("backbones", "llama"), ("tasks", "alpaca"), ("presets", "alpaca/llama-7b"),
                                            ("metrics", "rouge_l")])  # fmt: skip
def test_ls(zinit: Zinit, kind: str, name: str) -> None:
    entries = json.loads(zinit("ls", kind, "--json").out)
    assert entries[name]
    assert name in zinit("ls", kind).out


def test_convert_there_and_back(zinit: Zinit, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from zinit import PrefixConfig, attach

    model = save_tiny_llama(tmp_path / "model", num_key_value_heads=4)  # official files know no shared heads
    handle = attach(LlamaForCausalLM.from_pretrained(model), PrefixConfig(length=3, gate_init=0.3), seed=0)
    handle.save(tmp_path / "mine")
    official, back = tmp_path / "adapter.pth", tmp_path / "back"
    done = zinit("convert", tmp_path / "mine", official, "--from", "zinit", "--to", "official-v1", "--model", model)
    assert done.code == 0, done.err
    done = zinit("convert", official, back, "--from", "official-v1", "--to", "zinit", "--model", model, "--length", 3)
    assert done.code == 0, done.err
    assert f"{handle.num_trainable:,} parameters" in done.out
    expected, found = load_file(tmp_path / "mine" / "adapter.safetensors"), load_file(back / "adapter.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_doctor_finds_all_well(zinit: Zinit) -> None:
    done = zinit("doctor", "--json")
    assert done.code == 0, done.out
    document = json.loads(done.out)
    assert not document["problems"]
    found = document["found"]
    assert "closed gate exact" in found["demo llama"]
    assert found["cpu step"].startswith("loss ")
    assert "float32, bfloat16" in found["cpu dtypes"]
    assert "math" in found["cpu attention"]
    assert found["extra serve"] == "installed"
    assert not any(name.startswith("extra test") for name in found)


def test_tensorboard(zinit: Zinit, model: Path, data: Path, tmp_path: Path) -> None:
    done = zinit("train", "--backbone", "llama", "--model", model, "--data", data, *QUICK,
                 "-o", "train.tensorboard=true", "--output", tmp_path / "r", "--json")  # fmt: skip
    assert done.code == 0, done.err
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    file = next((tmp_path / "r").rglob("events.out.tfevents*"))
    board = EventAccumulator(str(file.parent))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4]


@pytest.mark.integration
def test_help_loads_no_models() -> None:
    code = "import sys; sys.argv=['zinit','--help']; from zinit.cli import app\ntry: app()\nexcept SystemExit: pass\n" \
           "print(sorted({'torch','transformers','datasets','accelerate','timm'} & set(sys.modules)))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("[]")
    assert "train" in done.stdout


OPTIONS = {
    "train": {"--backbone", "--task", "--method", "--model", "--encoder", "--data", "--preset", "--config", "--option",
              "--seed", "--output", "--resume", "--from", "--json"},
    "eval": {"--data", "--suite", "--fewshot", "--experts", "--index", "--option", "--limit", "--output", "--json"},
    "bench": {"--preset", "--config", "--backbone", "--task", "--method", "--seed", "--model", "--data", "--option",
              "--output", "--jobs", "--on", "--budget", "--dry-run", "--json"},
    "tune": {"--backbone", "--task", "--method", "--model", "--data", "--preset", "--option", "--validation", "--range",
             "--metric", "--trials", "--seed", "--output", "--jobs", "--json"},
    "generate": {"--prompt", "--input", "--data", "--output", "--batch", "--system", "--image", "--audio", "--video",
                 "--vector", "--experts", "--index", "--option", "--raw", "--temperature", "--top-p",
                 "--max-new-tokens", "--seed", "--frozen", "--json"},
    "chat": {"--system", "--image", "--audio", "--video", "--vector", "--experts", "--index", "--option",
             "--temperature", "--top-p", "--max-new-tokens", "--seed", "--frozen", "--web"},
    "serve": {"--host", "--port", "--api-key-file", "--model", "--template", "--batch", "--queue", "--max-tokens",
              "--max-seconds"},
    "inspect": {"--backbone", "--option", "--train", "--batch", "--length", "--json"},
    "ls": {"--json"},
    "convert": {"--from", "--to", "--model", "--length", "--gate", "--reader", "--tables", "--json"},
    "push": {"--private", "--json"},
    "index": set(),
    "doctor": {"--json"},
}  # fmt: skip


def test_the_set_of_options_is_frozen() -> None:
    import typer

    from zinit.cli import app

    found = {
        name: {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")} - {"--help"}
        for name, command in typer.main.get_command(app).commands.items()
    }
    assert found == OPTIONS, "a new setting goes into the config tree (-o), not into a new flag"


def test_a_line_that_is_no_text_is_told_and_the_chat_goes_on(
    zinit: Zinit, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = b"first\n\xff\xfe\n/image \xff.png\nlast\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    done = zinit("chat", finished, "--temperature", 0, "--max-new-tokens", 4)
    assert done.code == 0, done.err
    assert done.out.count("the prompt is not valid UTF-8 text. Say /new for a new one.") == 1
    assert "but was given \\udcff.png" in done.out
    assert not done.out.splitlines()[-1].startswith("(")
