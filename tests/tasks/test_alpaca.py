"""Alpaca's format: templates, tokens, labels, split, loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny import byte_tokenizer, save_tiny_llama
from zinit.demo import instructions, llama_path
from zinit.errors import ConfigError, DataError
from zinit.tasks.alpaca.task import Alpaca, AlpacaConfig
from zinit.tasks.alpaca.template import format_conversation, format_prompt
from zinit.tasks.base import TaskInputs

IGNORED = -100  # what torch calls a label without a loss
START = "Below is an instruction that describes a task"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(save_tiny_llama(tmp_path_factory.mktemp("model"))).eval()


def task(model: Any, records: list[dict[str, str]], folder: Path, tokenizer: Any = None, **settings: Any) -> Alpaca:
    file = folder / "data.json"
    file.write_text(json.dumps(records))
    config = AlpacaConfig(**settings)
    return Alpaca(TaskInputs(model=model, processor=tokenizer or byte_tokenizer(), data=str(file)), config)


def some(count: int, output: str = "yes") -> list[dict[str, str]]:
    return [{"instruction": f"Do {i}", "input": "", "output": output} for i in range(count)]


def test_templates_to_the_letter() -> None:
    assert format_prompt("Add.", "1 2") == (
        f"{START}, paired with an input that provides further context. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    )
    assert format_prompt("Sing.") == (
        f"{START}. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing.\n\n### Response:"
    )
    assert format_conversation([], "Sing.") == format_prompt("Sing.")
    assert format_conversation([("Hi", "Hello")], "Sing.").count("### Response:") == 2


def test_tokens_are_bos_prompt_response_eos_and_only_the_response_is_supervised(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    t = task(model, some(10, "blue"), tmp_path)
    tokenizer = t.tokenizer
    for index, example in enumerate(t.train_examples):
        assert example.ids[0] == tokenizer.bos_token_id
        assert example.ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(example.ids[1:-1]) == example.prompt + "blue"
        assert tokenizer.decode(example.ids[1 : example.prompt_length]) == example.prompt
        assert t.train_stream.counts[index] == len("blue") + 1


def test_text_that_looks_like_a_special_token_stays_text(model: LlamaForCausalLM, tmp_path: Path) -> None:
    records = [{"instruction": f"Say </s> {i}", "input": "<s>", "output": "a </s> b"} for i in range(4)]
    t = task(model, records, tmp_path)
    example = t.train_examples[0]
    assert example.ids.count(t.tokenizer.eos_token_id) == 1
    assert example.ids.count(t.tokenizer.bos_token_id) == 1


def test_a_prompt_is_the_same_tokens_in_training_and_generation(tmp_path: Path) -> None:
    """Where a tokenizer would merge across ":" and the response, the response is encoded by itself."""
    tokenizer = AutoTokenizer.from_pretrained(llama_path())
    model = LlamaForCausalLM.from_pretrained(llama_path())
    records = [
        {"instruction": f"Go {i}", "output": text} for i, text in enumerate(["\n\nhere", " yes", ":)", "-", "x"])
    ]
    t = task(model, records, tmp_path, tokenizer, max_length=256)
    for example in [*t.train_examples, *t.held_out_examples]:
        assert example.ids[: example.prompt_length] == Alpaca.encode_prompt(tokenizer, example.prompt)
        decoded = tokenizer.decode(example.ids[example.prompt_length :], skip_special_tokens=True)
        assert decoded == example.response


def test_cut_and_skipped_records_are_counted(model: LlamaForCausalLM, tmp_path: Path) -> None:
    records = [*some(20), {"instruction": "Long", "output": "x" * 400}, {"instruction": "y" * 400, "output": "z"},
               {"instruction": "Nothing", "output": " "}]  # fmt: skip
    t = task(model, records, tmp_path, max_length=200, held_out=1)
    counts = t.data_report()
    assert counts["read"] == 23
    parts = ("train", "held_out")
    assert sum(counts[p] + counts[f"{p}_skipped_prompt_too_long"] for p in parts) == 23
    assert sum(counts[f"{p}_skipped_prompt_too_long"] for p in parts) == 1
    assert sum(counts[f"{p}_truncated"] for p in parts) == 1
    assert sum(counts[f"{p}_empty_response"] for p in parts) == 1
    assert max(len(e.ids) for e in t.train_examples) == 200


def test_what_is_held_out_is_never_trained_on(model: LlamaForCausalLM, tmp_path: Path) -> None:
    records = some(50) + some(50, "no")  # every instruction twice
    t = task(model, records, tmp_path, held_out=7)
    held_out = {example.prompt for example in t.held_out_examples}
    assert len(t.held_out_examples) == 7
    assert not held_out & {example.prompt for example in t.train_examples}
    counts = t.data_report()
    assert counts["train"] + counts["held_out"] + counts["train_skipped_also_held_out"] == 100
    assert counts["train_skipped_also_held_out"] > 0


def test_the_demo_shares_nothing_between_its_parts() -> None:
    train, held_out = instructions()
    pairs = {(r["instruction"], r["input"]) for r in train}
    assert len(held_out) >= 100
    assert not pairs & {(r["instruction"], r["input"]) for r in held_out}


@pytest.mark.parametrize("indices", [[0], [3, 1, 2], list(range(8))])
def test_loss_equals_that_of_full_logits(model: LlamaForCausalLM, tmp_path: Path, indices: list[int]) -> None:
    records = [{"instruction": "a" * (1 + 3 * i), "output": "b" * (1 + i * i % 7)} for i in range(12)]
    t = task(model, records, tmp_path)
    found = t(t.collate(t.train_stream, indices))
    expected = torch.zeros(())
    for index in indices:  # one by one, no padding, all logits
        example = t.train_examples[index]
        ids = torch.tensor([example.ids])
        logits = model(input_ids=ids).logits[0, :-1]
        labels = torch.tensor([IGNORED] * example.prompt_length + example.ids[example.prompt_length :])[1:]
        expected = expected + F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert sum(t.train_stream.counts[index] for index in indices) > 0


def test_the_loss_on_texts_that_the_model_knows_is_transformers_own(model: LlamaForCausalLM, tmp_path: Path) -> None:
    texts = ["The river is long.", "A stone\nfalls into it. " * 20]
    (tmp_path / "known.txt").write_text("\n\n \n".join(texts) + "\n\n")
    said = {"known_texts": str(tmp_path / "known.txt"), "max_length": 256, "evaluation_limit": 0}
    t = task(model, some(10), tmp_path, **said)
    summed, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[0, *byte_tokenizer()(text.strip())["input_ids"]]])[:, :256]
        with torch.no_grad():
            summed += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert t.evaluate(Accelerator(cpu=True)).metrics == {"known_loss": pytest.approx(summed / count, rel=1e-5)}
    assert t.data_report()["known_paragraphs"] == 2
    (tmp_path / "known.txt").write_text(" \n\n \n")
    with pytest.raises(DataError, match=r"known\.txt"):
        task(model, some(10), tmp_path, **said)


def test_answers_do_not_depend_on_the_batch(model: LlamaForCausalLM, tmp_path: Path) -> None:
    t = task(model, some(4), tmp_path, max_new_tokens=5)
    prompts = ["a", "much longer prompt than the first", "bb"]
    assert t.answer(prompts) == [t.answer([prompt])[0] for prompt in prompts]


def test_more_tokens_than_the_model_has_room_for(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_length is 600, but the model has room for 512 tokens"):
        task(model, some(4), tmp_path, max_length=600)


def test_white_space_at_the_edges_is_no_content(model: LlamaForCausalLM, tmp_path: Path) -> None:
    assert format_prompt("Sing.", " \n\u3000") == format_prompt("Sing.")
    long = {"instruction": "Wait", "input": "", "output": " " * 400 + "now"}
    records = [*some(20), {"instruction": " \t", "input": "x", "output": "y"}, long]
    t = task(model, records, tmp_path, max_length=200, held_out=2)
    counts = t.data_report()
    parts = ("train", "held_out")
    assert sum(counts.get(f"{p}_skipped_blank_instruction", 0) for p in parts) == 1
    assert sum(counts.get(f"{p}_skipped_response_cut_to_blanks", 0) for p in parts) == 1
    assert sum(counts[f"{p}_truncated"] for p in parts) == 0
    assert len(t.train_examples) + len(t.held_out_examples) == 20 == sum(counts[p] for p in parts)


def test_records_of_two_columns_are_instructions_without_an_input(model: LlamaForCausalLM, tmp_path: Path) -> None:
    records = [{"question": f"Do {i}", "answer": "yes"} for i in range(12)]
    two = task(model, records, tmp_path, fields=("question", "answer"))
    three = task(model, some(12), tmp_path)
    assert two.fingerprint() == three.fingerprint()
    assert two.data_report() == three.data_report()
    with pytest.raises(DataError, match=r"has no field 'instruction'.*task\.fields=.*\(or INSTRUCTION,OUTPUT\)"):
        task(model, records, tmp_path)


def test_names_of_fields_are_the_sources_and_not_the_demos(model: LlamaForCausalLM) -> None:
    inputs = TaskInputs(model=model, processor=byte_tokenizer())
    other = Alpaca(inputs, AlpacaConfig(fields=("question", "answer")))
    assert other.fingerprint() == Alpaca(inputs, AlpacaConfig()).fingerprint()


def test_a_response_that_merges_with_the_prompts_end_is_encoded_by_itself(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    plain = byte_tokenizer()
    merging = json.loads(plain.backend_tokenizer.to_str())
    merging["model"]["vocab"][":yes"] = len(plain)
    merging["model"]["vocab"] |= {":y": len(plain) + 1, "es": len(plain) + 2}
    merging["model"]["merges"] = [[":", "y"], ["e", "s"], [":y", "es"]]
    merging["pre_tokenizer"]["use_regex"] = False  # as LLaMA's, which does not divide at ":" either
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(merging)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    assert len(tokenizer(":yes", add_special_tokens=False)["input_ids"]) == 1, "it does merge"
    example = task(model, some(4), tmp_path, tokenizer).train_examples[0]
    prompt = Alpaca.encode_prompt(tokenizer, example.prompt)
    assert example.ids[: example.prompt_length] == prompt
    response = tokenizer("yes", add_special_tokens=False)["input_ids"]
    assert example.ids[example.prompt_length :] == [*response, tokenizer.eos_token_id]


@pytest.mark.parametrize(("room", "kept"), [(-1, False), (0, False), (1, True)])
def test_a_prompt_needs_room_for_one_token_of_the_response(
    model: LlamaForCausalLM, tmp_path: Path, room: int, kept: bool
) -> None:
    records = [{"instruction": "a" * 20, "output": "yes"}, *some(3)]
    length = 1 + len(format_prompt("a" * 20))  # BOS, and a token per byte
    t = task(model, records, tmp_path, max_length=length + room, held_out_data=str(other(tmp_path)))
    assert (len(t.train_examples), t.data_report()["train_skipped_prompt_too_long"]) == (3 + kept, 1 - kept)
    assert min(t.train_stream.counts) >= 1


def other(folder: Path) -> Path:
    (folder / "other.json").write_text(json.dumps([{"instruction": "b", "output": "no"}]))
    return folder / "other.json"


def test_a_chat_keeps_its_turns_in_order() -> None:
    found = format_conversation([("Hi", " Hello"), ("Who?", " Me")], "Sing.")
    assert found.startswith(f"{START}. Write a response that appropriately completes the request.\n\n")
    assert found.partition("request.\n\n")[2] == (
        "### Instruction:\nHi\n\n### Response: Hello\n\n### Instruction:\nWho?\n\n### Response: Me\n\n"
        "### Instruction:\nSing.\n\n### Response:"
    )


def test_fields_that_are_not_used_are_named_with_a_count(model: LlamaForCausalLM, tmp_path: Path) -> None:
    records = [
        {**record, "system": "Be brief." if i % 2 else " ", "history": [["a", "b"]] if i == 3 else [], "id": None}
        for i, record in enumerate(some(10))
    ]
    counts = task(model, records, tmp_path).data_report()
    assert {name: n for name, n in counts.items() if "unused" in name} == {
        "unused_field_system": 5,
        "unused_field_history": 1,
    }


def test_unused_fields_of_every_record_its_own_do_not_fill_the_report(model: LlamaForCausalLM, tmp_path: Path) -> None:
    records = [{**record, f"x{i}": "y", "system": "z"} for i, record in enumerate(some(30))]
    counts = task(model, records, tmp_path).data_report()
    assert counts["unused_field_system"] == 30
    assert counts["unused_fields_more"] == 11
    assert sum("unused" in name for name in counts) == 21


def test_what_differs_in_white_space_only_is_the_same(model: LlamaForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text(json.dumps([{"instruction": " Do\n3", "output": "b"}]))
    counts = task(model, some(5), tmp_path, held_out_data=str(tmp_path / "dev.json")).data_report()
    assert (counts["train"], counts["train_skipped_also_held_out"]) == (4, 1)


def test_several_sources_are_read_in_order_and_counted(model: LlamaForCausalLM, tmp_path: Path) -> None:
    csv = tmp_path / "b.csv"
    csv.write_text('instruction,output\nAdd 1,2\n"Say ""a, b""","a,\nb"\n')
    (tmp_path / "a.json").write_text(json.dumps(some(3)))
    inputs = TaskInputs(model=model, processor=byte_tokenizer(), data=(str(tmp_path / "a.json"), str(csv)))
    t = Alpaca(inputs, AlpacaConfig(held_out_data=str(other(tmp_path))))
    assert [example.response for example in t.train_examples] == ["yes", "yes", "yes", "2", "a,\nb"]
    counts = t.data_report()
    assert (counts["read"], counts["read_source_1"], counts["read_source_2"]) == (6, 3, 2)
    assert inputs.sources == (str(tmp_path / "a.json"), str(csv))
    with pytest.raises(ConfigError, match="reads one source; got 2"):
        assert inputs.source


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("instruction,output\na,b,c\n", "record 1: the row has more cells than the header; beyond it are list"),
        ("instruction\na\n", "record 1 has no field 'output'; it has instruction"),
        (f'instruction,output\na,"{"x" * 140_000}"\n', "line 2 cannot be read as CSV: field larger than"),
        ("instruction,output\n", "holds no records"),
    ],
)
def test_tables_that_are_wrong(model: LlamaForCausalLM, tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(DataError, match=says):
        Alpaca(TaskInputs(model=model, processor=byte_tokenizer(), data=str(tmp_path / "bad.csv")), AlpacaConfig())


def test_numbers_are_the_text_that_stands_for_them(model: LlamaForCausalLM, tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"instruction": i, "input": 0.5, "output": i + 1} for i in range(4)]
    example = task(model, records, tmp_path).train_examples[0]
    assert example.prompt in [format_prompt(str(i), "0.5") for i in range(4)]
    assert example.response in "1234"
    for wrong in (True, float("nan"), ["a"]):
        with pytest.raises(DataError, match="'output' must be text"):
            task(model, [{"instruction": "a", "output": wrong}], tmp_path)
