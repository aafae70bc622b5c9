"""``zinit generate --data``: every record has its line, in order, whatever happens in between."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serve.world import folders
from zinit.errors import ConfigError, DataError
from zinit.runs.record import RECORD, Record
from zinit.runs.settings import resolve
from zinit.serve.groups import Group
from zinit.ui import answers
from zinit.ui.answers import Asking, answer_file
from zinit.ui.chat import ChatSession

RECORDS: list[dict[str, Any]] = [
    {"instruction": "Say red.", "input": "loudly", "output": "red"},
    {"prompt": "Name it", "note": "x"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"instruction": "x" * 600},
    *({"instruction": f"Say it {number} times" + " more" * number} for number in range(8)),
]


@pytest.fixture
def data(tmp_path: Path) -> str:
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return str(tmp_path / "q.jsonl")


def greedy(**more: Any) -> Asking:
    return Asking(run_dir=str(folders()["anna"]), temperature=0, max_new_tokens=12, **more)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_single_prompts_in_order(data: str, tmp_path: Path) -> None:
    counts = answer_file(greedy(), data, str(tmp_path / "a.jsonl"), batch=3)
    assert counts == {"read": 12, "answered": 11, "refused": 1, "answer_left_out": 2, "unused_field_note": 1}
    found = lines(tmp_path / "a.jsonl")
    assert [line["index"] for line in found] == list(range(12))
    session = ChatSession(folders()["anna"], temperature=0, max_new_tokens=12)
    for number, record in enumerate(RECORDS):
        question = record.get("instruction") or record.get("prompt") or "a"
        if number == 3:
            assert "there is room for 511" in found[3]["error"]
        else:
            assert found[number]["answer"] == session.answer(question, input=record.get("input", ""), stream=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl"]


def test_a_stopped_file_is_gone_on_with(data: str, tmp_path: Path) -> None:
    """Stopped after five answers, the sixth torn: nothing is asked twice, and drawn answers are the same."""
    how: dict[str, Any] = {"temperature": 1.0, "seed": 5}
    asking = Asking(run_dir=str(folders()["anna"]), max_new_tokens=12, **how)
    answer_file(asking, data, str(tmp_path / "whole.jsonl"), batch=3)

    def stop(done: int, of: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    output = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_file(asking, data, str(output), batch=2, progress=stop)
    assert not output.exists()
    part = tmp_path / "a.jsonl.part" / answers.ANSWERS
    assert len(lines(part)) == 5
    part.write_bytes(part.read_bytes() + b'{"index": 5, "ans')
    for other in ({"seed": 6}, {"system": "Be kind."}, {"base": True}):
        with pytest.raises(ConfigError, match=f"was begun with another {next(iter(other))}"):
            answer_file(Asking(**{**vars(asking), **other}), data, str(output))
    asked: list[int] = []
    answer_file(asking, data, str(output), batch=4, progress=lambda done, of: asked.append(done))
    assert asked == list(range(6, 13))
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        answer_file(asking, data, str(output))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "record 2: expected one of the fields messages, conversations, instruction and prompt; it has"),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "record 2 asks nothing that can be answered: roles do not alternate",
        ),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "record 2 asks nothing.*roles do not alternate"),
        ({"prompt": "x", "image": "gone.png"}, "record 2 asks nothing.*wrong number of images"),
        ({"prompt": "<image>x", "image": "gone.png"}, "record 2 asks nothing.*missing image"),
    ],
    ids=str,
)
def test_records_that_ask_nothing_are_named(record: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps([{"prompt": "x"}, record]))
    with pytest.raises(DataError, match=message):
        answer_file(greedy(), str(tmp_path / "q.json"), str(tmp_path / "a.jsonl"))
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("name", [answers.SETTINGS, answers.ANSWERS])
@pytest.mark.parametrize("content", [b"{\n", b"\xff\n", b"7\n"])
def test_damage_to_what_was_begun_is_told(name: str, content: bytes, data: str, tmp_path: Path) -> None:
    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_file(greedy(), data, str(tmp_path / "a.jsonl"), progress=stop)
    (tmp_path / "a.jsonl.part" / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} is damaged: .* Remove the folder, or name another --output"):
        answer_file(greedy(), data, str(tmp_path / "a.jsonl"))


@pytest.fixture
def seeing(tmp_path: Path) -> Path:
    """A run whose adapter takes images."""
    found = folders()
    folder = Path(shutil.copytree(found["eyes"], tmp_path / "seeing"))
    config, _ = resolve(
        backbone="llama",
        task="conversation",
        method="v1-multimodal",
        model=str(found["model"]),
        encoder=str(found["eyes"].parent / "encoder"),
        data=["none"],
        options=["prefix.layers=2", "prefix.length=3", "task.template=chat65b"],
    )
    record = Record(config=config.to_dict(), backbone="llama", task="conversation", model=str(found["model"]), seed=0)
    (folder / RECORD).write_text(json.dumps(vars(record)))
    return folder


def shown(folder: Path, *images: str) -> str:
    """A file of questions about an image each, and of one about none."""
    asked = [*({"prompt": "<image>What is it?", "image": image} for image in images), {"prompt": "What is it?"}]
    (folder / "shown.json").write_text(json.dumps(asked))
    return str(folder / "shown.json")


@pytest.mark.parametrize("base", [False, True], ids=["adapted", "frozen"])
def test_images_are_taken_as_training_takes_them(base: bool, seeing: Path, tmp_path: Path) -> None:
    """Of 20 million pixels and more; the base, which does not see them, answers all the same."""
    Image.new("1", (5000, 4400)).save(tmp_path / "large.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "cut.png")
    before, data, after = (tmp_path / "cut.png").read_bytes().partition(b"IDAT")
    (tmp_path / "cut.png").write_bytes(before + data + bytes(4) + after[4:])  # its header and its end are whole
    asking = Asking(run_dir=str(seeing), temperature=0, max_new_tokens=6, base=base)
    answer_file(asking, shown(tmp_path, "large.png", "cut.png"), str(tmp_path / "a.jsonl"))
    large, cut, plain = lines(tmp_path / "a.jsonl")
    assert "answer" in large, large
    assert not base or large["answer"] == plain["answer"]
    assert "cut.png" in cut["error"]


@pytest.mark.parametrize("base", [False, True], ids=["adapted", "frozen"])
def test_a_language_only_run_answers_no_question_about_an_image(base: bool, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    answer_file(greedy(base=base), shown(tmp_path, "red.png"), str(tmp_path / "a.jsonl"))
    line, plain = lines(tmp_path / "a.jsonl")
    assert "answer" in plain
    assert "takes no images" in line["error"]
    assert ("language-only" in line["error"]) == base


def test_a_fault_of_the_engine_is_no_answer(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered before stays, and the same command goes on."""
    answer_file(greedy(), data, str(tmp_path / "whole.jsonl"), batch=2)
    add, calls = Group.add, list[int]()

    def fault(group: Group, rows: Any) -> None:
        calls.append(len(rows))
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        add(group, rows)

    monkeypatch.setattr(Group, "add", fault)
    output = tmp_path / "a.jsonl"
    with pytest.raises(RuntimeError, match=r"record .* got no answer: the server has a fault"):
        answer_file(greedy(), data, str(output), batch=2)
    assert not output.exists()
    kept = lines(tmp_path / "a.jsonl.part" / answers.ANSWERS)
    assert kept
    assert all("fault" not in line.get("error", "") for line in kept)
    monkeypatch.setattr(Group, "add", add)
    answer_file(greedy(), data, str(output), batch=2)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
