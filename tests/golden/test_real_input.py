"""Real weights and real Alpaca records, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.shared import SHARED
from tests.stories import SOURCE, save_stories
from tests.tiny import zinit

pytestmark = pytest.mark.skipif(not SOURCE.exists(), reason="../shared/data is absent")
ALPACA = SHARED / "data" / "alpaca"


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stories(tmp_path_factory.mktemp("stories"))


def test_the_conversion_gives_the_known_loss(stories: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    ids = [1, 403, 407, 261, 378, 432, 383, 286, 261, 262, 423, 388, 400, 428, 395, 326, 426]
    text = "Once upon a time, there was a small dog named Tim."
    assert [1, *tokenizer(text, add_special_tokens=False)["input_ids"]] == ids
    model = LlamaForCausalLM.from_pretrained(stories)
    tokens = torch.tensor([ids])
    assert model(input_ids=tokens, labels=tokens).loss.item() == pytest.approx(0.8008, abs=1e-4)


@pytest.mark.integration
def test_alpaca_lowers_the_held_out_loss(stories: Path, tmp_path: Path) -> None:
    """The Alpaca records of Stanford's that are in ../shared; the same numbers in as out."""
    done = zinit("train", "--backbone", "llama", "--model", stories, "--data", ALPACA / "alpaca_5000.json",
                 "-o", "prefix.length=10", "-o", "steps=5", "-o", "batch_size=32", "-o", "micro_batch_size=8",
                 "-o", "learning_rate=0.03", "-o", "warmup_steps=2", "-o", "max_length=192", "-o", "held_out=32",
                 "-o", "evaluate_every=0", "-o", "evaluation_limit=2", "-o", "max_new_tokens=8",
                 "--output", tmp_path / "run", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    frozen, adapted = document["metrics"]["base"]["loss"], document["metrics"]["adapted"]["loss"]
    assert adapted < frozen - 0.1
    counts = document["counts"]
    kept = counts["train"] + counts["held_out"]
    skipped = sum(n for name, n in counts.items() if "skipped" in name)
    assert counts["read"] == 3365 == kept + skipped


@pytest.mark.parametrize(
    ("file", "options", "count"),
    [
        ("litgpt_fixture_alpaca.json", (), 23),
        ("instruction-data.json", (), 737),
        ("alpaca_zh_demo.json", (), 650),
        ("code_alpaca_2k.json", (), 1344),
        ("toolformer-similarity-0.6-dataset.json", (), 1578),
        ("alpaca_eval_alpaca-7b_outputs.json", (), 535),
        ("litgpt_fixture_dolly.json", ("instruction", "context", "response"), None),
    ],
)
def test_schemas_people_have(file: str, options: tuple[str, ...], count: int | None) -> None:
    from zinit.data.records import read_records

    instruction, input, output = options or ("instruction", "input", "output")
    records = read_records(str(ALPACA / file), required=(instruction, output), optional=(input,))
    assert len(records) == (count or len(json.loads((ALPACA / file).read_text())))
    assert all(record[instruction] for record in records)


def test_other_schemas_are_refused_by_field(tmp_path: Path) -> None:
    from zinit.data.records import read_records
    from zinit.errors import DataError

    with pytest.raises(DataError, match=r"seed_tasks.jsonl, record 1 has no field 'output'; it has id, name, instruct"):
        read_records(str(ALPACA / "seed_tasks.jsonl"), required=("instruction", "output"))
