"""Records of conversations in every form: one form comes out, and what cannot be used is counted."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.shared import SHARED, needs_data
from zinit.data.conversations import Conversation, Round, read_conversations
from zinit.data.images import Encoded, read_image
from zinit.errors import DataError

ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def read(folder: Path, *records: Any, **settings: Any) -> tuple[list[Conversation], Counter[str]]:
    file, counts = folder / "talks.json", Counter[str]()
    file.write_text(json.dumps(records))
    return read_conversations(str(file), counts=counts, **settings), counts


def one(folder: Path, **record: Any) -> Conversation:
    (found,), counts = read(folder, record)
    assert counts == {"read": 1}
    return found


def save_image(path: Path, color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), color).save(path)
    return path


def test_every_form_says_the_same(tmp_path: Path) -> None:
    expected = Conversation(
        system="Be kind.", rounds=(Round(question="a", answer="b"), Round(question="c", answer="d"))
    )
    told = {"role": "system", "content": "Be kind."}
    texts = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    messages = [{"role": role, "content": text} for role, text in texts]
    shared = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in texts]
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    assert one(tmp_path, messages=[told, *messages]) == expected
    assert one(tmp_path, messages=[told, *parts]) == expected
    assert one(tmp_path, messages=messages, system="Be kind.") == expected
    assert one(tmp_path, conversations=[{"from": "system", "value": "Be kind."}, *shared]) == expected
    assert one(tmp_path, conversations=[told, *messages]) == expected
    assert one(tmp_path, prompt=[told, *messages[:3]], completion=messages[3:]) == expected  # TRL's
    history = [["a", "b"]]
    assert one(tmp_path, instruction="c", output="d", system="Be kind.", history=history) == expected


def test_a_prompt_and_a_completion_are_a_question_and_its_answer(tmp_path: Path) -> None:
    assert one(tmp_path, prompt="Hi", completion="Hello") == Conversation(
        rounds=(Round(question="Hi", answer="Hello"),)
    )
    with pytest.raises(DataError, match=r"or prompt and completion; it has prompt, completion"):
        read(tmp_path, {"prompt": "Hi", "completion": [ANSWERED]})


def test_alpacas_input_and_a_category_are_kept(tmp_path: Path) -> None:
    found = one(tmp_path, instruction="Add.", input="1 2", output="3", history=None, category="sums")
    assert found == Conversation(rounds=(Round(question="Add.", input="1 2", answer="3"),), category="sums")
    assert found.rounds[0].asked == "Add.\n\n1 2"


@pytest.mark.parametrize(
    ("reason", "record"),
    [
        ("empty_answer", {"messages": [ASKED, {"role": "assistant", "content": " "}]}),
        ("empty_answer", {"messages": [ASKED, {"role": "assistant", "content": None}]}),
        ("empty_answer", {"instruction": "Sing.", "output": ""}),
        ("empty_question", {"messages": [{"role": "user", "content": " "}, ANSWERED]}),
        ("empty_question", {"instruction": "", "output": "x"}),
        ("roles_do_not_alternate", {"messages": [ANSWERED, ASKED, ANSWERED]}),
        ("roles_do_not_alternate", {"messages": [ASKED, ASKED, ANSWERED]}),
        ("roles_do_not_alternate", {"messages": [ASKED, ANSWERED, {"role": "system", "content": "x"}, ANSWERED]}),
        ("no_answer", {"messages": [ASKED]}),
        ("no_answer", {"messages": []}),
        ("unknown_role", {"messages": [ASKED, {"role": "tool", "content": "4"}, ANSWERED]}),
        ("unknown_content", {"messages": [{"role": "user", "content": [{"type": "file"}]}, ANSWERED]}),
        ("missing_audio", {"messages": [{"role": "user", "content": "<audio>Who?"}, ANSWERED], "audio": "b.wav"}),
        ("missing_video", {"messages": [{"role": "user", "content": [{"type": "video", "video": "c"}]}, ANSWERED]}),
        ("missing_audio", {"instruction": "<audio>", "output": "x", "audio": "frames"}),
        ("several_senses", {"instruction": "<audio><image>", "output": "x", "audio": "a.png", "image": "a.png"}),
        ("wrong_number_of_images", {"messages": [{"role": "user", "content": "<image>Who?"}, ANSWERED]}),
        ("wrong_number_of_images", {"messages": [ASKED, ANSWERED], "image": "a.png"}),
        ("missing_image", {"messages": [{"role": "user", "content": "<image>Who?"}, ANSWERED], "image": "b.png"}),
        ("missing_image", {"messages": [{"role": "user", "content": "<image>?"}, ANSWERED], "image": "http://a/b.png"}),
        ("unreadable_image", {"messages": [{"role": "user", "content": "<image>?"}, ANSWERED], "image": "torn.png"}),
        (
            "unreadable_image",
            {"messages": [{"role": "user", "content": "<image>?"}, ANSWERED], "image": "data:image/png;base64,AAAA"},
        ),
    ],
)
def test_what_cannot_be_used_is_counted(reason: str, record: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    (tmp_path / "torn.png").write_bytes(save_image(tmp_path / "a.png").read_bytes()[:20])
    found, counts = read(tmp_path, record, {"messages": [ASKED, ANSWERED]})
    assert len(found) == 1
    assert counts == {"read": 2, f"skipped_{reason}": 1}


def test_a_last_question_without_an_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    (found,), counts = read(tmp_path, {"messages": [ASKED, ANSWERED, ASKED]})
    assert found.rounds == (Round(question="Hi", answer="Hello"),)
    assert counts == {"read": 1, "cut_unanswered_question": 1}


def test_fields_that_are_not_used_are_named(tmp_path: Path) -> None:
    calls = {**ANSWERED, "tool_calls": [{"name": "f"}], "name": ""}
    _, counts = read(tmp_path, {"id": 7, "messages": [ASKED, calls, ASKED, calls], "instruction": "x", "note": None})
    assert counts == {
        "read": 1,
        "unused_field_id": 1,
        "unused_field_instruction": 1,
        "unused_field_messages.tool_calls": 1,
    }


def test_images_come_in_the_order_of_their_marks(tmp_path: Path) -> None:
    red, blue = save_image(tmp_path / "in" / "red.png"), save_image(tmp_path / "in" / "blue.png", "blue")
    names = ["in/red.png", "in/blue.png"]
    asked = [
        {"role": "user", "content": "<image>\nWho?"},
        ANSWERED,
        {"role": "user", "content": "And?<image>"},
        ANSWERED,
    ]
    found = one(tmp_path, messages=asked, images=names)
    assert found.images == (red, blue)
    assert [each.question for each in found.rounds] == ["Who?", "And?"]
    parts = [{"type": "image"}, {"type": "text", "text": "Same?"}, {"type": "image", "image": "in/red.png"}]
    assert one(tmp_path, messages=[{"role": "user", "content": parts}, ANSWERED], image=["in/blue.png"]).images == (
        blue,
        red,
    )
    shared = [{"from": "human", "value": "What is this?\n<image>"}, {"from": "gpt", "value": "An <image> tag."}]
    found = one(tmp_path, conversations=shared, image="in/red.png")
    assert (found.images, found.rounds[0].question) == ((red,), "What is this?")
    assert found.rounds[0].answer == "An <image> tag.", "only what is asked has marks"
    (elsewhere,), _ = read(tmp_path, {"conversations": shared, "image": "red.png"}, image_folder=tmp_path / "in")
    assert elsewhere.images == (red,)


def test_an_image_may_be_all_that_is_asked(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    found = one(tmp_path, messages=[{"role": "user", "content": "<image>"}, ANSWERED], image="a.png")
    assert found.rounds[0].question == ""


def test_images_inside_the_records(tmp_path: Path) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    content = io.BytesIO()
    Image.new("RGB", (3, 5), "green").save(content, "PNG")
    address = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "?"}]
    found = one(tmp_path, messages=[{"role": "user", "content": parts}, ANSWERED])
    assert read_image(found.images[0]).size == (3, 5)
    turn = {"role": Value("string"), "content": Value("string")}
    features = Features({"messages": List(turn), "images": List(ImageFeature())})
    messages = [{"role": "user", "content": "<image>?"}, ANSWERED]
    table = Dataset.from_dict(
        {"messages": [messages], "images": [[{"bytes": content.getvalue(), "path": None}]]}, features=features
    )
    table.to_parquet(str(tmp_path / "talks.parquet"))
    (stored,) = read_conversations(str(tmp_path / "talks.parquet"), counts=Counter())
    assert isinstance(stored.images[0], Encoded), "not decoded before it is needed"
    assert read_image(stored.images[0]).getpixel((0, 0)) == (0, 128, 0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "record 1: expected an object with the field messages .* it has text"),
        ({"instruction": "x"}, "instruction and output, or prompt and completion; it has instruction"),
        ("x", 'instruction and output, or prompt and completion; str "x"'),
        ({"messages": "x"}, "'messages' must be a list of turns; got str"),
        ({"messages": [{"content": "x"}]}, "a turn needs role and content"),
        ({"messages": [{"role": "user", "content": 5}]}, "must be text or a list of parts; got int 5"),
        ({"messages": [ASKED, ANSWERED], "system": ["x"]}, "the field 'system' must be text"),
        ({"instruction": "a", "output": "b", "history": "c"}, "'history' must be a list of"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "'history' must hold pairs"),
        ({"instruction": "<image>", "output": "b", "image": "../x.png"}, "leaves the folder"),
        ({"instruction": "<image>", "output": "b", "image": "a\0.png"}, r"'a.*png' is no path that a file can have"),
        ({"instruction": "<image>", "output": "b", "image": "\ud800.png"}, "is no path that a file can have"),
        ({"instruction": "<image>", "output": "b", "image": 5}, "an image must be a path"),
        ({"instruction": "<image>", "output": "b", "image": "data:image/png;base64,%"}, "holds no base64"),
        ({"messages": [{"role": "user", "content": "\ud800"}, ANSWERED]}, "half of a surrogate pair"),
    ],
)
def test_a_wrong_record_is_one_message(record: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, record)


@needs_data
@pytest.mark.parametrize(
    ("file", "expected", "rounds"),
    [
        ("alpaca/dummy_conversation.json", {"read": 331, "unused_field_id": 331}, 685),
        ("alpaca/alpaca_zh_demo.json", {"read": 650}, 650),
        ("examples/mllm_demo/mllm_demo.json", {"read": 4}, 8),
    ],
)
def test_real_records(file: str, expected: dict[str, int], rounds: int) -> None:
    counts = Counter[str]()
    found = read_conversations(str(SHARED / "data" / file), counts=counts)
    assert counts == expected
    assert sum(len(each.rounds) for each in found) == rounds
    assert sum(len(each.images) for each in found) == (6 if "mllm" in file else 0)
