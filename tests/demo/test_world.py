"""The embedded demo's invented world, and the causal language model that was pretrained on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice

import pytest
from transformers import PreTrainedTokenizerBase

from zinit import demo
from zinit.demo import world

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def words(record: dict[str, str]) -> set[str]:
    """The words of a record, without punctuation."""
    text = " ".join(record.values())
    return {word.strip(".,?()") for word in text.split()}


@pytest.mark.integration
def test_the_world_is_a_function_of_its_seed() -> None:
    code = (
        "import hashlib, json; from itertools import islice; from zinit import demo; from zinit.demo import world;"
        "data = [demo.instructions(), list(islice(world.texts(world.build()), 200))];"
        "print(hashlib.sha256(json.dumps(data).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
    assert world.build(1) != world.build(0)
    assert list(islice(world.texts(world.build(), seed=1), 5)) != list(islice(world.texts(world.build(), seed=0), 5))


@pytest.mark.integration
def test_importing_the_demo_loads_no_torch() -> None:
    code = (
        "import sys; from zinit import demo; demo.instructions(); demo.llama_path(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_records_are_in_alpaca_format() -> None:
    train, held_out = demo.instructions()
    assert 400 <= len(train) <= 1500
    assert 100 <= len(held_out) <= 200
    for part in (train, held_out):
        assert all(record.keys() == {"instruction", "input", "output"} for record in part)
        assert all(record["instruction"] and record["output"] for record in part)
        assert 0.3 < sum(bool(record["input"]) for record in part) / len(part) < 0.5


def test_train_and_held_out_share_no_instruction_and_no_entity() -> None:
    train, held_out = demo.instructions()
    assert not {record["instruction"] for record in train} & {record["instruction"] for record in held_out}

    here = world.build()
    assert not here.held_out & set().union(*map(words, train)), "a held-out entity occurs in a training record"
    seen = set(here.people + here.towns) - here.held_out
    for record in held_out:
        asked = words({"instruction": record["instruction"], "input": record["input"]})
        assert asked & here.held_out
        assert not asked & seen


def test_every_record_is_a_fact_that_the_texts_tell() -> None:
    here = world.build()
    told = "\n".join(islice(world.texts(here), 20_000))
    for subject, facts in here.facts.items():
        for fact in facts:
            assert any(fact.tell(template) in told for template in fact.relation.tells), (subject, fact.relation.name)
    facts = {(fact.subject, fact.object) for facts in here.facts.values() for fact in facts}
    for part in demo.instructions():
        for record in part:
            assert any((word, record["output"]) in facts for word in words(record))


def test_a_cloze_is_a_statement_cut_before_its_end() -> None:
    here = world.build()
    told = "\n".join(islice(world.texts(here), 20_000))
    cuts = world.cloze(here, held_out=True)
    assert len(cuts) == sum(len(here.facts[subject]) for subject in here.held_out)
    assert all(fact.relation.cloze in fact.relation.tells for facts in here.facts.values() for fact in facts)
    assert sum(beginning + ending + "." in told for beginning, ending in cuts) > 0.95 * len(cuts)


def test_alpacas_prompt_is_not_in_the_texts() -> None:
    told = "\n".join(islice(world.texts(world.build()), 20_000))
    for phrase in ("Below is an instruction", "appropriately completes", "### Response"):
        assert phrase not in told


# --- the shipped model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.llama_path(), local_files_only=True)


def test_the_shipped_files_are_small_and_float16() -> None:
    from safetensors import safe_open

    assert sum(file.stat().st_size for file in demo.llama_path().iterdir()) < 2_500_000
    with safe_open(demo.llama_path() / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118
    assert json.loads((demo.llama_path() / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Where does Odra live?",
        "  two  spaces \n\n\ttabs\r\n",
        "naïve façade, Übergröße",
        "日本語と한국어",
        "🦙👩‍👩‍👧 emoji",
        "\x00\x7f\u200b\ufeff",
        "don't , stop .",
    ],
)
def test_the_tokenizer_gives_any_text_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id is None
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]


def test_padding_does_not_disturb(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = tokenizer(["a", "a longer text"], padding=True, return_tensors="pt")
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert batch["attention_mask"].sum(1).tolist() == [
        len(tokenizer(text)["input_ids"]) for text in ("a", "a longer text")
    ]


def test_the_model_knows_the_world_and_the_held_out_entities_too(tokenizer: PreTrainedTokenizerBase) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from scripts.pretrain_llama import cloze_accuracy

    model = AutoModelForCausalLM.from_pretrained(demo.llama_path(), local_files_only=True, dtype=torch.float32)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert cloze_accuracy(model, tokenizer, world.cloze(world.build(), held_out=True)) > 0.97
    assert cloze_accuracy(model, tokenizer, world.cloze(world.build(), held_out=False)[::10]) > 0.97
