"""Conversations as tokens: templates, what is learned, the same prompt in training and in generation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.shared import needs_data
from tests.tasks.talks import CHATS, DROPS, KINDS, OWN_KINDS, REWRITES, talk, tokenizer
from zinit.data.conversations import Conversation, Round
from zinit.errors import ConfigError
from zinit.tasks.alpaca.examples import encode_records
from zinit.tasks.alpaca.template import format_conversation, format_prompt
from zinit.tasks.conversation.encode import Encoded, Encoder, encode_conversations
from zinit.tasks.conversation.registry import TEMPLATES
from zinit.tasks.conversation.template import TEXT_TEMPLATES, make_template

TALK = talk("Who are you?", "I am a llama.", "  And:\n\nwhere? ", "In Peru.\n", "Naïve 中文 😀?", ":) yes")
ODD = talk("Say </s><|done|>", "<|turn|>user\nhi <s>", "</s>", " </s> ", "?", "<|endoftext|>!")
WITH_SYSTEM = replace(TALK, system="Speak <|done|> short.")
ALL = [pytest.param(kind, marks=[] if kind in OWN_KINDS else needs_data) for kind in KINDS]
FORMS = [*TEXT_TEMPLATES, *CHATS, REWRITES]


def encoder(kind: str, form: str, system: str | None = None) -> Encoder:
    own = form not in TEXT_TEMPLATES
    return Encoder(make_template("tokenizer" if own else form, tokenizer(kind, form if own else None), system))


def encode(made: Encoder, conversation: Conversation) -> Encoded:
    return next(made.encode([conversation]))


def learned(made: Encoder, found: Encoded) -> list[str]:
    return [made.tokenizer.decode(found.ids[start:end]) for start, end in found.answers]


def test_templates_to_the_letter() -> None:
    polite = "assistant. The assistant gives helpful, detailed, and polite answers to the"
    expected = {
        "vicuna": f"A chat between a curious user and an artificial intelligence {polite} user's questions. "
        "USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT: See you</s>",
        "chat65b": f"A chat between a curious human and an artificial intelligence {polite} human's questions.###"
        "Human: Hi###Assistant: Hello###Human: Bye###Assistant: See you###",
        "alpaca": format_conversation([("Hi", "Hello</s>")], "Bye") + "See you</s>",
    }
    for form, text in expected.items():
        made = encoder("bytes", form)
        found = encode(made, talk("Hi", "Hello", "Bye", "See you"))
        assert made.tokenizer.decode(found.ids) == f"<s>{text}", form
        ended = "###" if form == "chat65b" else "</s>"
        assert [part.strip() for part in learned(made, found)] == [f"Hello{ended}", f"See you{ended}"]
        told = made.tokenizer.decode(encode(made, talk("Hi", "Hello", system="Be brief.")).ids)
        assert told.startswith("<s>Be brief.")
        assert "polite" not in told
        assert made.tokenizer.decode(encode(encoder("bytes", form, "Sing."), TALK).ids).startswith("<s>Sing.")


@pytest.mark.parametrize("kind", ALL)
def test_one_turn_of_alpaca_is_the_task_alpacas_bit_for_bit(kind: str) -> None:
    records = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": " Sing </s> ", "input": "", "output": "\nLa la  "},
        {"instruction": "Merge:", "input": " ", "output": " a"},
    ]
    made = encoder(kind, "alpaca")
    expected, _ = encode_records(made.tokenizer, records, max_length=512)
    for record, example in zip(records, expected, strict=True):
        only = Round(question=record["instruction"], input=record["input"], answer=record["output"])
        found = encode(made, Conversation(rounds=(only,)))
        assert found.ids == example.ids
        assert found.answers == ((example.prompt_length, len(example.ids)),)
        assert made.prompt(Conversation(rounds=(only,))) == example.ids[: example.prompt_length]


def test_alpacas_inputs_have_a_section_in_every_round() -> None:
    made = encoder("bytes", "alpaca")
    rounds = (Round(question="Add.", input="1 2", answer="3"), Round(question="Add.", input="3 4"))
    text = made.tokenizer.decode(made.prompt(Conversation(rounds=rounds)))
    assert text == (
        f"<s>{format_prompt('Add.', '1 2')}3</s>\n\n### Instruction:\nAdd.\n\n### Input:\n3 4\n\n### Response:"
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ALL)
def test_a_prompt_is_the_same_tokens_in_training_and_in_generation(kind: str, form: str) -> None:
    made = encoder(kind, form)
    for conversation in (TALK, ODD, WITH_SYSTEM):
        found = encode(made, conversation)
        rounds = conversation.rounds[-len(found.answers) :] if form == REWRITES else conversation.rounds
        assert len(rounds) == len(found.answers)
        for number, (start, _) in enumerate(found.answers, start=len(conversation.rounds) - len(rounds) + 1):
            asked = (*conversation.rounds[: number - 1], replace(conversation.rounds[number - 1], answer=""))
            assert made.prompt(replace(conversation, rounds=asked)) == found.ids[:start]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ALL)
def test_special_tokens_in_a_text_stay_text(kind: str, form: str) -> None:
    made = encoder(kind, form)
    innocent = talk("a", "b", "c", "d", "e", "f")
    special = set(made.tokenizer.all_special_ids) - {made.tokenizer.unk_token_id}
    found, plain = ([i for i in encode(made, each).ids if i in special] for each in (ODD, innocent))
    assert found == plain
    texts = [made.tokenizer.decode(encode(made, each).ids) for each in (ODD, WITH_SYSTEM)]
    assert all(each.question.strip() in texts[0] and each.answer.strip() in texts[0] for each in ODD.rounds)
    assert "Speak <|done|> short." in texts[1]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("form", ["marked", "told"])
def test_what_is_learned_is_what_the_template_marks(kind: str, form: str) -> None:
    made = encoder(kind, form)
    for conversation in (TALK, replace(TALK, system="Be short.")):
        messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
        for each in conversation.rounds:
            messages += [{"role": "user", "content": each.question.strip()}]
            messages += [{"role": "assistant", "content": each.answer.strip()}]
        whole: Any = made.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = whole["input_ids"], whole["assistant_masks"]
        found = encode(made, conversation)
        spans = [i for start, end in found.answers for i in range(start, end)]
        assert found.ids == ids[: len(found.ids)]
        assert spans == [i for i, one in enumerate(mask) if one]
        asked = made.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        assert made.prompt(conversation) == asked


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("form", CHATS)
def test_ids_are_those_of_the_tokenizers_own_rendering(kind: str, form: str) -> None:
    """Turn by turn: every answer and what ends it follows the prompt that asks for it."""
    made = encoder(kind, form)
    messages: list[dict[str, str]] = []

    def apply(messages: list[dict[str, str]], **settings: Any) -> list[int]:
        return made.tokenizer.apply_chat_template(messages, **settings)["input_ids"]

    decode = made.tokenizer.decode
    found = encode(made, TALK)
    for each, (start, end) in zip(TALK.rounds, found.answers, strict=True):
        messages.append({"role": "user", "content": each.question.strip()})
        prompt = apply(messages, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": each.answer.strip()})
        assert decode(found.ids[:start]) == decode(prompt)
        assert decode(apply(messages)).startswith(decode(found.ids[:end]))
        ends = {"brackets": made.tokenizer.eos_token, "words": each.answer.strip()}
        assert decode(found.ids[start:end]).strip().endswith(ends.get(form, "<|done|>"))


@pytest.mark.parametrize(
    ("form", "tokens", "texts"),
    [
        ("vicuna", ["</s>"], ()),
        ("alpaca", ["</s>"], ()),
        ("chat65b", ["</s>"], ("###",)),
        ("marked", ["</s>", "<|done|>"], ()),
        ("brackets", ["</s>"], ()),
    ],
)
def test_what_ends_an_answer(form: str, tokens: list[str], texts: tuple[str, ...]) -> None:
    template = encoder("bytes", form).template
    assert template.tokenizer.convert_ids_to_tokens(template.stop_tokens) == tokens
    assert template.stops == texts


def test_a_system_text_without_a_place_comes_before_the_first_question() -> None:
    made = encoder("bytes", "no-system")
    text = made.tokenizer.decode(made.prompt(talk("Hi", "Hello", "Bye", system="Be kind.")))
    assert text == (
        "<s><|turn|>user\nBe kind.\n\nHi<|done|>\n<|turn|>assistant\nHello<|done|>\n"
        "<|turn|>user\nBye<|done|>\n<|turn|>assistant\n"
    )


def test_a_template_that_rewrites_answers_teaches_the_last_and_says_so() -> None:
    made = encoder("bytes", REWRITES)
    (found,), counts = encode_conversations(made, [TALK], max_length=512)
    assert learned(made, found) == [":) yes<|done|>"]
    assert counts["_only_last_answer"] == 1


def test_a_template_speaks_of_the_same_day_every_day() -> None:
    form = CHATS["marked"].replace("{% for", "{{ strftime_now('%d %b %Y') }}{% for", 1)
    assert encoder("bytes", form).tokenizer is not None
    made = encoder("bytes", form)
    assert made.tokenizer.decode(made.prompt(talk("Hi"))).startswith("26 Jul 2024<|turn|>")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (DROPS, "leaves out 1 of 4 texts"),
        ("{{ nothing.at.all }}", "cannot be used: .* task.template=vicuna or alpaca or chat65b"),
        (CHATS["marked"].replace("assistant\\n' }}{% endif", "thinking\\n' }}{% endif"), "in other words"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_message(form: str, message: str) -> None:
    made = encoder("bytes", form)
    with pytest.raises(ConfigError, match=message):
        made.prompt(talk("a", "b", "c"))


def test_templates_by_name() -> None:
    assert {"tokenizer", *TEXT_TEMPLATES} == set(TEMPLATES)
    assert type(make_template("auto", tokenizer("bytes", "marked"))) is TEMPLATES.get("tokenizer")
    assert type(make_template("auto", tokenizer("bytes"))) is TEMPLATES.get("vicuna")
    with pytest.raises(ConfigError, match=r"no template named 'vicunna'. Did you mean 'vicuna'"):
        make_template("vicunna", tokenizer("bytes"))
    with pytest.raises(ConfigError, match=r"has no chat template. Take one of vicuna, alpaca, chat65b"):
        make_template("tokenizer", tokenizer("bytes"))


# Length


def test_a_long_conversation_loses_rounds_from_the_front() -> None:
    made = encoder("bytes", "alpaca")
    long = talk(*(f"{'q' * 20} {i}" if i % 2 == 0 else f"a{i}" for i in range(20)), system="Be kind.")
    whole = len(encode(made, long).ids)
    for room in (whole, whole - 1, 300, 200):
        (found,), counts = encode_conversations(made, [long], max_length=room)
        left = found.conversation.rounds
        assert left == long.rounds[10 - len(left) :]
        assert len(found.ids) <= room
        assert made.tokenizer.decode(found.ids).startswith("<s>Be kind.")
        more = replace(long, rounds=long.rounds[9 - len(left) :])
        assert len(left) == 10 or len(encode(made, more).ids) > room, "no round too many"
        assert counts["_rounds_cut"] == 10 - len(left)
        assert counts["_cut_at_front"] == (len(left) < 10)
        assert counts["_truncated"] == 0


def test_a_last_round_that_is_too_long_is_cut_at_its_end_or_skipped() -> None:
    made = encoder("bytes", "vicuna", "S")
    start = len(made.prompt(talk("q")))
    talks = [talk("x", "y", "q", "a" * 50), talk("q" * 80, "a"), talk("q", " " * 0 + "\u2003".join("ab"))]
    found, counts = encode_conversations(made, talks, max_length=start + 10)
    assert [each.answers for each in found] == [((start, start + 10),), ((start, start + 7),)]
    assert learned(made, found[0]) == [" " + "a" * 9]
    assert [len(each.ids) for each in found] == [start + 10, start + 7]
    assert {name: n for name, n in counts.items() if n} == {
        "": 2,
        "_cut_at_front": 1,
        "_rounds_cut": 1,
        "_truncated": 1,
        "_skipped_prompt_too_long": 1,
    }
    _, counts = encode_conversations(made, [talk("q", "abc")], max_length=start + 1)
    assert counts["_skipped_answer_cut_to_blanks"] == 1
    _, counts = encode_conversations(made, [talk("q", "abc")], max_length=start)
    assert counts["_skipped_prompt_too_long"] == 1
