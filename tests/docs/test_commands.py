"""Every command, option and setting that a document names exists."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from tests.shared import ROOT
from zinit.bench.plan import make_benchmark
from zinit.cli import app
from zinit.data.conversations import read_conversations
from zinit.ui.settings import settings_tables

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "examples/README.md", "zinit/demo/README.md",
             *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")))  # fmt: skip
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
OPTION = re.compile(r"-o ([a-z]\w*(?:\.\w+)*)=")
FREE = re.compile(r"parts\.\w+\.(\w+)|train\.rates\.\w+\.(gates|prompts|source|tuning|head)")  # names of the user's own


def commands_in(text: str) -> list[str]:
    """Those of the shell's blocks, continued lines joined, and those in a line's code."""
    blocks = re.findall(r"^```(?:bash|shell)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [part.strip() for line in lines for part in re.split(r"&&|\|", line.partition("  #")[0])]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    return [
        re.sub(r"^.*-m zinit ", "zinit ", command) for command in found if re.match(r"(.*-m )?zinit [a-z]", command)
    ]


def unknown_in(command: str) -> list[str]:
    """What there is not: the command, or options of it."""
    name, *words = shlex.split(command, comments=True)[1:]
    of = COMMANDS.get(name)
    if hasattr(of, "commands") and words:
        name, *words = words
        of = of.commands.get(name)  # pyright: ignore[reportOptionalMemberAccess]
    if of is None:
        return [name]
    flags = {flag for parameter in of.params for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    return [word for word in words if word.startswith("-") and word.partition("=")[0] not in flags]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_exist_and_take_their_options(name: str) -> None:
    for command in commands_in((ROOT / name).read_text(encoding="utf-8")):
        assert not unknown_in(command), command


def test_settings_that_documents_name_exist() -> None:
    known = {setting.name for table in settings_tables() if table.of != "benchmark" for setting in table.settings}
    known |= {"method", "method.name", "context", "context.name", "tuning"}
    short = {name.rpartition(".")[2] for name in known}
    named = 0
    for document in DOCUMENTS:
        for name in OPTION.findall((ROOT / document).read_text(encoding="utf-8")):
            free = FREE.fullmatch(name)
            assert name in known or name in short or (free and free[1] in short | {None}), (document, name)
            named += 1
    assert named > 50


def test_what_documents_name_wrongly_is_found() -> None:
    block = "zinit eval runs/x --sweet mme   # no\ntorchrun -m zinit train ... --output x"
    found = commands_in(f"Say `zinit trian` or\n```bash\n{block}\n```\n")
    assert found == ["zinit eval runs/x --sweet mme", "zinit train ... --output x", "zinit trian"]
    assert [unknown_in(command) for command in found] == [["--sweet"], [], ["trian"]]
    assert unknown_in("zinit index build INDEX --data x -z") == ["-z"]
    assert OPTION.findall("-o train.epohs=3 -o lora:train.epochs=1") == ["train.epohs"]


def code_in(document: str, language: str) -> str:
    """All blocks of a language."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    return "".join(re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize(
    ("document", "answers"), [("questions.md", ["A kiln."]), ("tune.md", ["No, from Tuesday on."] * 2)]
)
def test_records_that_documents_show_are_read(document: str, answers: list[str], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "1.jpg")
    for number, line in enumerate(code_in(document, "json").splitlines()):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(line)
        counts: Counter[str] = Counter()
        (conversation,) = read_conversations(str(file), counts=counts)
        assert counts == {"read": 1}
        assert [one.answer for one in conversation.rounds] == [answers[number]]
        assert conversation.images == ((tmp_path / "photos" / "1.jpg",) if "image" in line else ())
    assert number + 1 == len(answers)


def test_the_benchmark_of_the_guide_to_comparing_is_complete(tmp_path: Path) -> None:
    (tmp_path / "bench.toml").write_text(code_in("compare.md", "toml"))
    benchmark = make_benchmark(config_file=str(tmp_path / "bench.toml"))
    benchmark.check()
    (experiment,) = benchmark.experiments
    assert (len(list(experiment.cells())), len(list(experiment.selection_cells()))) == (6 * 5, 6 * 3)
