"""The task conversation: what is read, held out, learned, answered and scored."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from tests.experts.stubs import registered
from tests.tasks.talks import tokenizer
from tests.tiny import save_tiny_llama
from zinit.errors import ConfigError
from zinit.tasks.base import DataInputs, TaskInputs
from zinit.tasks.conversation.task import ConversationConfig, ConversationTask
from zinit.tasks.joint.task import Joint

KINDS = ("sums", "songs", "")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"), vocab_size=272)
    return LlamaForCausalLM.from_pretrained(folder).eval()


def talks(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """ShareGPT records of one to three rounds."""
    return [
        {
            "conversations": [
                turn
                for n in range(1 + i % 3)
                for turn in ({"from": "human", "value": f"Ask {i}.{n}"}, {"from": "gpt", "value": f"Say {i}.{n}"})
            ],
            "category": KINDS[i % 3],
        }
        for i in range(start, start + count)
    ]


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(records))
    return str(path)


def make(model: Any, data: str | tuple[str, ...] | None, *, chat: str | None = None, **settings: Any) -> Any:
    config = ConversationConfig(**{"template": "alpaca", "max_new_tokens": 6, **settings})
    return ConversationTask(TaskInputs(model=model, processor=tokenizer("bytes", chat), data=data), config)


def read(data: str | tuple[str, ...], *, train: bool = True, **settings: Any) -> Any:
    return ConversationTask.read_data(DataInputs(data=data, train=train), ConversationConfig(**settings))


@pytest.mark.parametrize(
    ("chat", "settings"), [(None, {}), ("marked", {"template": "auto"}), (None, {"packing": True})]
)
def test_the_loss_is_that_of_every_answer_and_of_nothing_else(
    model: Any, chat: str | None, settings: dict[str, Any], tmp_path: Path
) -> None:
    t = make(model, write(tmp_path / "a.json", talks(12)), chat=chat, **settings)
    indices = list(range(8))
    batch = t.collate(t.train_stream, indices)
    expected = torch.zeros(())
    for example in (t.train_examples[index] for index in indices):
        ids = torch.tensor(example.ids)
        labels = torch.full_like(ids, -100)
        for start, end in example.answers:
            labels[start:end] = ids[start:end]
        expected += F.cross_entropy(model(ids[None]).logits[0, :-1], labels[1:], reduction="sum", ignore_index=-100)
        answers = [t.tokenizer.decode(example.ids[start:end]) for start, end in example.answers]
        end = "<|done|>" if chat else "</s>"
        assert [text[:4] + text[-len(end) :] for text in answers] == [f"Say {end}"] * len(answers)
    torch.testing.assert_close(t(batch), expected, rtol=1e-5, atol=1e-5)
    assert sum(t.train_stream.counts[index] for index in indices) == len(batch["targets"])
    assert max(len(example.answers) for example in t.train_examples) == 3


def test_what_goes_in_comes_out_or_is_counted(model: Any, tmp_path: Path) -> None:
    odd = [{"messages": [{"role": "user", "content": "a"}]}, {"instruction": "x", "output": "", "id": 3}]
    long = [{"instruction": "q" * 400, "output": "a"}, {"instruction": "q", "output": "a" * 400}]
    sources = (write(tmp_path / "a.json", [*talks(30), *odd]), write(tmp_path / "b.json", long))
    counts = make(model, sources, max_length=256, held_out=3).data_report()
    skipped = sum(number for name, number in counts.items() if "skipped" in name)
    assert counts["read"] == 34 == counts["train"] + counts["held_out"] + skipped
    assert skipped == counts["skipped_no_answer"] + counts["skipped_empty_answer"] + 1 == 3
    assert counts["train_truncated"] + counts["held_out_truncated"] == 1
    assert (counts["read_source_1"], counts["read_source_2"], counts["unused_field_id"]) == (30, 2, 1)


def test_no_held_out_prompt_is_trained_on(tmp_path: Path) -> None:
    held_out = [{"instruction": "What  is it?", "output": "A cat."}]
    training = [
        {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A dog."},
                      {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
        {"instruction": "What is it?", "output": "A hat.", "system": "Lie."},
        {"instruction": "Why?", "output": "So."},
    ]  # fmt: skip
    data, other = write(tmp_path / "a.json", training), write(tmp_path / "b.json", held_out)
    kept, asked, counts = read(data, held_out_data=other)
    assert len(asked) == 1
    assert [talk.rounds[0].answer for talk in kept] == ["A hat.", "So."], "another system text is another prompt"
    assert counts == {"read": 4, "train_skipped_also_held_out": 1}


def test_a_prompt_with_another_image_is_another_prompt(tmp_path: Path) -> None:
    for name, color in (("a", "red"), ("b", "blue"), ("c", "red")):
        Image.new("RGB", (4, 4), color).save(tmp_path / f"{name}.png")
    records = [{"instruction": "<image>What?", "output": name, "image": f"{name}.png"} for name in "abc"]
    data, other = write(tmp_path / "a.json", records[1:]), write(tmp_path / "b.json", records[:1])
    kept, _, counts = read(data, held_out_data=other)
    assert [talk.rounds[0].answer for talk in kept] == ["b"], "c is a's picture under another name"
    without, _, _ = read(data, held_out_data=other, images=False)
    assert without == kept, "runs with and without images train on the same conversations"
    assert counts["train_skipped_also_held_out"] == 1


def test_weights_are_passes_over_each_source(model: Any, tmp_path: Path) -> None:
    sources = (write(tmp_path / "a.json", talks(20)), write(tmp_path / "b.json", talks(30, start=20)))
    t = make(model, sources, weights=(2, 0.5), held_out=4)
    own = [Counter(example.source for example in t.train_examples)[n] for n in (0, 1)]
    assert sum(own) == 46
    assert t.train_stream.passes == ((own[0], 2), (own[1], 0.5))
    numbers = [int(example.instruction.split()[1].partition(".")[0]) for example in t.train_examples]
    assert [example.source for example in t.train_examples] == [int(number >= 20) for number in numbers]
    assert numbers == sorted(numbers), "source by source"
    counts = t.data_report()
    assert [counts[f"train_source_{n}"] for n in (1, 2)] == own
    assert [counts[f"epoch_source_{n}"] for n in (1, 2)] == [2 * own[0], round(own[1] / 2)]
    assert make(model, sources).train_stream.passes == ()
    with pytest.raises(ConfigError, match=r"task.weights has 1 numbers for 2 sources: give one for each --data"):
        read(sources, weights=(2,))
    assert read(sources, weights=(2,), train=False, held_out_data=sources[0])[0] == [], "an evaluation trains nothing"


def test_answers_are_scored_over_all_and_by_category(model: Any, tmp_path: Path) -> None:
    other = write(tmp_path / "b.json", talks(9, start=50))
    t = make(model, write(tmp_path / "a.json", talks(12)), held_out_data=other)
    asked = []

    def answer(encoded: list[list[int]], examples: list[Any], **_: Any) -> list[str]:
        asked.extend(t.tokenizer.decode(ids) for ids in encoded)
        return [e.response if e.category != "songs" else "no" for e in examples]

    t._answers = answer
    found = t.evaluate(Accelerator(cpu=True))
    assert found.metrics == pytest.approx(
        {"exact_match": 6 / 9, "rouge_l": 6 / 9, "exact_match/songs": 0.0, "exact_match/sums": 1.0}
    )
    assert found.counts == {"answered": 9, "answered/sums": 3, "answered/songs": 3}
    assert all(text.endswith("### Response:") for text in asked)
    assert sorted(text.count("Say") for text in asked) == [0, 0, 0, 1, 1, 1, 2, 2, 2], "all that was said before"
    assert found.samples[0]["prompt"] == asked[0]
    assert found.samples[0]["expected"].startswith("Say")


def test_answers_to_another_question_about_the_image_are_told(model: Any, tmp_path: Path) -> None:
    """Wrong here, and right for what else is asked about the image: by category, and only where images are."""
    t = make(model, write(tmp_path / "a.json", talks(20)))
    asked = [
        ("x", "name", "Ypil"),
        ("x", "river", "Oder"),
        ("x", "river", "Oder"),
        ("y", "river", "Don"),
        ("", "river", "Po"),
    ]
    examples = [
        dataclasses.replace(
            t.train_examples[0], digests=(image.encode(),) if image else (), category=kind, response=text
        )
        for image, kind, text in asked
    ]
    found = t.score(examples, ["Ypil", "Ypil", "Oder", "Oder", "Ypil"]).metrics
    assert found["another_question/name"] == 0.0, "right"
    assert found["another_question/river"] == pytest.approx(1 / 3), "the name; Oder is no answer about y; no image"
    apart = [dataclasses.replace(e, digests=(bytes([n]),)) for n, e in enumerate(examples)]
    assert not [name for name in t.score(apart, ["Ypil"] * 5).metrics if name.startswith("another")], (
        "one question each"
    )
    assert ConversationTask.direction("another_question/river") == "lower"
    assert Joint.direction("visual_another_question/river") == "lower"
    assert Joint.direction("visual_exact_match/river") == "higher"


def test_an_answer_ends_where_the_template_ends_it(model: Any, tmp_path: Path) -> None:
    """A model that says one text over and over is stopped by a special token, and by a text."""
    data = write(tmp_path / "a.json", talks(12))
    for chat, template, said, expected in (
        ("marked", "tokenizer", "ab<|done|>cd", "ab"),
        (None, "chat65b", "ab###cd", "ab"),
        (None, "alpaca", "a#</s>cd", "a#"),
        (None, "vicuna", "ab###cd", "ab###cd"),
    ):
        t = make(model, data, chat=chat, template=template, max_new_tokens=7)
        ids = t.tokenizer(said, add_special_tokens=False)["input_ids"]
        steps: list[int] = []
        hook = model.register_forward_hook(_speaking(ids, steps))
        try:
            found = t._answers([t.held_out_examples[0].ids[: t.held_out_examples[0].prompt_length]])
        finally:
            hook.remove()
        assert found == [expected], template
        assert len(steps) == min(7, len(ids)) if template == "vicuna" else len(steps) < len(ids)


def _speaking(ids: list[int], steps: list[int]) -> Any:
    def hook(module: Any, args: Any, output: Any) -> Any:
        output.logits[:] = 0
        output.logits[:, -1, ids[min(len(steps), len(ids) - 1)]] = 9.0
        steps.append(1)
        return output

    return hook


def test_the_demo_needs_no_data(model: Any) -> None:
    t = make(model, None)
    counts = t.data_report()
    assert counts["read"] == counts["train"] + counts["held_out"] > 500


def test_images_need_an_adapter_that_takes_them(model: Any, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    records = [{"instruction": f"<image>Is it {i}?", "output": "Yes.", "image": "a.png"} for i in range(10)]
    data = write(tmp_path / "a.json", records)
    with pytest.raises(ConfigError, match=r"10 examples have images, and the method takes none.*task.images=false"):
        make(model, data)
    counts = make(model, data, images=False).data_report()
    assert (counts["train_images_left_out"], counts["held_out_images_left_out"]) == (9, 1)


def test_experts_write_into_the_input_of_what_is_asked(model: Any, tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    for i in range(20):
        Image.new("RGB", (4, 4), (i * 10, 0, 0)).save(tmp_path / f"{i}.png")
        records.append({"image": f"{i}.png", **talks(1, start=i)[0]})
        records[i]["conversations"][0]["value"] += "<image>"
    records[0] = talks(1)[0]
    data, held_out = write(tmp_path / "a.json", records[10:]), write(tmp_path / "b.json", records[:4])
    plain = make(model, data, held_out_data=held_out, images=False)
    with registered():
        t = make(model, data, held_out_data=held_out, images=False, experts=("painter:15",))
        one_round = len(plain.held_out_examples[3].ids)
        short = make(model, data, held_out_data=held_out, images=False, experts=("painter:15",), max_length=one_round)
    assert [example.ids for example in t.train_examples] == [example.ids for example in plain.train_examples]
    for example, before, red in zip(t.held_out_examples, plain.held_out_examples, (None, 10, 20, 30), strict=True):
        text, old = t.tokenizer.decode(example.ids), plain.tokenizer.decode(before.ids)
        if red is None or red < 15:
            assert text == old
            continue
        head, mark, tail = old.rpartition("\n\n### Response:")
        if head.count("### Instruction:") == 1:  # a prompt of one round says that there is an input
            head = head.replace("a task. Write", "a task, paired with an input that provides further context. Write")
        assert text == f"{head}\n\n### Input:\nThe colour: red {red}{mark}{tail}"
    counts = {name: count for name, count in t.data_report().items() if "expert" in name}
    expected = {"held_out_expert_painter": 2, "held_out_expert_painter_cut": 0, "held_out_expert_painter_empty": 1}
    assert counts == expected
    assert short.data_report()["held_out_experts_left_out"] == 2
    assert not any("red" in short.tokenizer.decode(example.ids) for example in short.held_out_examples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "vicunna"}, r"no template named 'vicunna'. Did you mean 'vicuna'"),
        ({"weights": (1, 0)}, "weights must be a list of numbers above 0, one for each --data"),
        ({"weights": ()}, "weights must be a list of numbers above 0"),
    ],
)
def test_wrong_settings_are_one_message(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConversationConfig(**settings)


def test_of_many_unused_fields_the_most_frequent_are_named(tmp_path: Path) -> None:
    records = [{"instruction": f"q{i}", "output": "a", f"field{i}": 1, "always": 1} for i in range(30)]
    _, _, counts = read(write(tmp_path / "a.json", records))
    assert sum(name.startswith("unused_field_") for name in counts) == 20
    assert (counts["unused_field_always"], counts["unused_fields_more"]) == (30, 11)
