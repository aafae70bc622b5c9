"""Math word problems: prompt, tokens, fields of two sources, what is skipped, what counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM

from tests.tiny import byte_tokenizer, save_tiny_llama
from zinit.errors import ConfigError, DataError
from zinit.tasks.base import TaskInputs
from zinit.tasks.math.task import Math, MathConfig

PROBLEMS = [{"query": f"What is {n} + 1?", "response": f"It is {n + 1}.\nThe answer is: {n + 1}"} for n in range(10)]
SCHOOL = [
    {"question": "How many?", "answer": "2 * 3 = <<2*3=6>>6\n#### 6"},
    {"question": "What is 3 + 1?", "answer": "As above.\n#### 4"},
    {"question": "Which?", "answer": "Nobody knows."},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(save_tiny_llama(tmp_path_factory.mktemp("model"))).eval()


def task(model: Any, folder: Path, **settings: Any) -> Math:
    (folder / "train.json").write_text(json.dumps(PROBLEMS))
    (folder / "school.jsonl").write_text("\n".join(map(json.dumps, SCHOOL)))
    school = {"held_out_data": str(folder / "school.jsonl"), "held_out_fields": "question,answer"}
    config = MathConfig.from_dict({"max_length": 200, "max_new_tokens": 8, **school, **settings})
    return Math(TaskInputs(model=model, processor=byte_tokenizer(), data=str(folder / "train.json")), config)


def test_prompt_and_solution_to_the_letter_and_only_the_solution_is_trained_on(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    t = task(model, tmp_path)
    example = t.train_examples[0]
    prompt = "Question: What is 0 + 1? Think step by step.\nAnswer:"
    assert example.prompt == prompt
    assert t.tokenizer.decode(example.ids[1:-1]) == prompt + "It is 1.\nThe answer is: 1"
    assert t.tokenizer.decode(example.ids[1 : example.prompt_length]) == prompt
    assert t.train_stream.counts[0] == len("It is 1.\nThe answer is: 1") + 1
    assert Math.format_prompt("Add.", "1 2") == "Question: Add.\n\n1 2 Think step by step.\nAnswer:"


def test_held_out_problems_have_fields_of_their_own_and_are_not_trained_on(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    t = task(model, tmp_path)
    assert [example.response for example in t.held_out_examples] == [record["answer"] for record in SCHOOL[:2]]
    report = t.data_report()
    assert (report["held_out_skipped_no_final_answer"], report["train_skipped_also_held_out"]) == (1, 1)
    assert "What is 3 + 1?" not in {example.instruction for example in t.train_examples}
    assert report["read"] == len(PROBLEMS) + len(SCHOOL)
    assert report["train"] + report["held_out"] + 2 == report["read"]


def test_final_answers_are_scored(model: LlamaForCausalLM, tmp_path: Path) -> None:
    t = task(model, tmp_path)
    answers = ["6 of them. The answer is: 6.00", "It is 5. The answer is: 5"]
    assert t.score(t.held_out_examples, answers).metrics == {"final_answer": 0.5}
    measured = t.evaluate(Accelerator(cpu=True))
    assert measured.metrics == {"final_answer": 0.0}
    assert measured.counts == {"answered": 2}
    assert torch.isfinite(t(t.collate(t.train_stream, [0, 1])))


def test_what_is_missing_is_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data of its own: --data FILE_OR_HUB_ID with query and response"):
        Math(TaskInputs(model=model, processor=byte_tokenizer(), data=None), MathConfig(max_length=200))
    with pytest.raises(DataError, match=r"task\.held_out_fields=PROBLEM,SOLUTION"):
        task(model, tmp_path, held_out_fields=None)
    with pytest.raises(ConfigError, match="held_out_fields are those of held_out_data"):
        MathConfig(held_out_fields=("a", "b"))
    (tmp_path / "none.json").write_text(json.dumps([{"query": "Why?", "response": "So."}]))
    with pytest.raises(DataError, match=r"none of 1 held-out solutions names its final answer .* first is 'So\.'"):
        task(model, tmp_path, held_out_data=str(tmp_path / "none.json"), held_out_fields=None)


def test_the_preset_of_pefts_comparison_fits_a_smaller_model(tmp_path: Path) -> None:
    """Its protocol, on a small model: the same settings, fewer layers."""
    from zinit.runs.settings import resolve
    from zinit.runs.train import train_run

    save_tiny_llama(tmp_path / "model")
    (tmp_path / "train.json").write_text(json.dumps(PROBLEMS))
    (tmp_path / "test.json").write_text(json.dumps(SCHOOL))
    said = ["train.steps=2", "train.warmup_steps=1", "task.max_length=200", "task.max_new_tokens=4", "dtype=float32"]
    test = [f"task.held_out_data={tmp_path / 'test.json'}", "task.held_out_fields=question,answer"]
    where = {"model": str(tmp_path / "model"), "data": str(tmp_path / "train.json")}
    config, name = resolve(backbone="llama", preset="math/metamathqa-llama-3b", options=[*said, *test], **where)
    assert (config.method, config.train.batch_size, config.options.evaluation_limit) == ("zero-init-tuned", 4, 1319)
    found = train_run(config, tmp_path / "run", preset=name)
    assert found["metrics"]["adapted"]["final_answer"] == 0.0
    assert found["metrics"]["adapted"]["loss"] != found["metrics"]["base"]["loss"]
