"""Nothing that zinit shows or writes holds a control character of the data: terminals obey them."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.tiny import byte_tokenizer
from zinit import cli
from zinit.bench.plan import Benchmark, Experiment
from zinit.bench.summary import Row
from zinit.bench.write import as_csv, as_markdown
from zinit.config import to_json
from zinit.errors import ConfigError, printable
from zinit.runs.directory import Log
from zinit.train.events import Evaluated, Stage
from zinit.ui import chat, console

EVIL = "a\x1b]0;title\x07b\x9b2Jc\x7f\rd"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def test_every_control_character_is_written_out() -> None:
    every = "".join(map(chr, range(0x110)))
    shown = printable(every)
    assert not CONTROL.search(shown)
    assert [c for c in shown if c in "\t\n"] == ["\t", "\n"]
    assert "\\x1b" in shown
    assert shown.endswith("".join(map(chr, range(0xA0, 0x110))))


def test_bytes_that_are_no_text_are_written_out() -> None:
    name = os.fsdecode(b"a\xff\xc3\xa9")
    assert printable(name) == "a\\udcff\xe9"
    printable(name).encode()


def test_nothing_on_the_terminal_is_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_error(ConfigError(EVIL))
    console.print_table(EVIL, [EVIL], [[EVIL]])
    console.print_json({EVIL: [EVIL]})
    console.say(EVIL)
    counts = {f"unused_field_{EVIL}": 3}
    console.print_metrics({"metrics": {EVIL: {EVIL: 1.0}}, "seed": 0, "counts": counts, "baseline": EVIL}, title=EVIL)
    view = console.RunView()
    view(Stage(EVIL))
    view.console.print(f"Everything is in {EVIL}")
    found = capsys.readouterr()
    for stream in (found.out, found.err):
        assert "2Jc" in stream
        assert not CONTROL.search(stream.replace("\n", "")), stream


def test_consoles_keep_their_own_colours() -> None:
    made = console.SafeConsole(force_terminal=True, color_system="standard", legacy_windows=False, highlight=False)
    with made.capture() as captured:
        made.print("[bold]x", style="red")
    assert "\x1b[31m" in captured.get()
    assert "[bold]x" in captured.get(), "data is no markup"


def test_every_console_is_a_clean_one() -> None:
    sources = (Path(cli.__file__).parent / "ui").glob("*.py")
    plain = {path.name for path in sources if re.search(r"(?<!Safe)Console\(|(?<![\w.])print\(", path.read_text())}
    assert plain <= {"console.py", "chat.py"}  # where they are made; fixed texts of the chat
    assert issubclass(console.SafeConsole, Console)


def test_a_model_says_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(EVIL + " end\n", add_special_tokens=False)["input_ids"]
    streamer = chat._streamer(tokenizer, ())
    import torch

    streamer.put(torch.tensor([[0]]))  # the prompt
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    found = capsys.readouterr().out
    assert "end" in found
    assert not CONTROL.search(found.replace("\n", "")), found


def test_documents_and_logs_hold_none(tmp_path: Path) -> None:
    assert json.loads(to_json({EVIL: EVIL})) == {EVIL: EVIL}
    log = Log(tmp_path, True, lambda event: None)
    log(Evaluated(1, {EVIL: 0.5}))
    assert not CONTROL.search(log.path.read_text().replace("\n", ""))


def test_warnings_are_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(cli, "app", lambda: None)
    cli.main()
    assert "\\x9b2J" in warnings.formatwarning(UserWarning(EVIL), UserWarning, EVIL, 1)
    assert not CONTROL.search(warnings.formatwarning(UserWarning(EVIL), UserWarning, EVIL, 1).replace("\n", ""))


def test_the_summary_of_a_benchmark_holds_no_html_and_keeps_its_table() -> None:
    text = f"<img src=x onerror=alert(1)>\n|{EVIL}\\|&"
    experiment: Any = Experiment(name=text, backbone="llama", methods=("zero-init",), seeds=(0,), note=text)
    row = Row(experiment=text, metric="f1", method=text, vary={text: text}, dataset=text, problem=text)
    found = as_markdown(Benchmark(experiments=(experiment,), description=text), [row], {text: [text]})
    assert "<" not in found
    assert not CONTROL.search(found.replace("\n", ""))
    lines = [line for line in found.splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines}) == 1, "as many cells in every line"
    assert len(lines) == 3
    assert not CONTROL.search(as_csv([row]).replace("\n", ""))
