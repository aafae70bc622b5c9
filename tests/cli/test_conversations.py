"""Real conversations through the command line: runs end, and what goes in is what comes out or is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Zinit
from tests.shared import SHARED, needs_data

DATA = SHARED / "data"
BRIEF = ("-o", "steps=2", "-o", "warmup_steps=0", "-o", "batch_size=4", "-o", "task.max_new_tokens=2",
         "-o", "task.evaluation_limit=2", "-o", "task.held_out=6")  # fmt: skip


def counts_of(zinit: Zinit, folder: Path, *arguments: object) -> dict[str, Any]:
    done = zinit("train", "--backbone", "llama", "--task", "conversation", *BRIEF, *arguments, "--output", folder)
    assert done.code == 0, done.err
    assert (folder / "adapter.safetensors").is_file()
    counts = json.loads((folder / "metrics.json").read_text())["counts"]
    skipped = sum(number for name, number in counts.items() if "skipped" in name)
    assert counts["read"] == counts["train"] + counts["held_out"] + skipped
    return counts


@needs_data
def test_sources_of_several_forms_with_weights(zinit: Zinit, tmp_path: Path) -> None:
    sources = [item for name in ("dummy_conversation", "alpaca_zh_demo")
               for item in ("--data", DATA / "alpaca" / f"{name}.json")]  # fmt: skip
    counts = counts_of(zinit, tmp_path / "run", *sources, "-o", "task.weights=[3,0.5]")
    assert counts["read"] == 331 + 650
    assert (counts["held_out"], counts["unused_field_id"]) == (6, 331)
    assert counts["epoch_source_1"] == 3 * counts["train_source_1"]
    assert counts["epoch_source_2"] == pytest.approx(counts["train_source_2"] / 2, abs=0.5)
    assert counts["train_cut_at_front"] > 0
    for figures in json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"].values():
        first, second = figures["loss/source_1"], figures["loss/source_2"]
        assert min(first, second) < figures["loss"] < max(first, second)
    asked = ("--prompt", "Who are you?", "--system", "Be brief.", "--max-new-tokens", 4, "--temperature", 0)
    done = zinit("generate", tmp_path / "run", *asked, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["system"] == "Be brief."
    done = zinit(
        "eval", tmp_path / "run", "--data", DATA / "alpaca" / "dummy_conversation.json", "--limit", 1, "--json"
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["counts"]["read"] == 331


@needs_data
def test_conversations_with_images(zinit: Zinit, tmp_path: Path) -> None:
    folder = DATA / "examples" / "mllm_demo"
    data = ("--data", folder / "mllm_demo.json")
    counts = counts_of(zinit, tmp_path / "left-out", *data, "-o", "task.images=false")
    assert (counts["read"], counts["train"], counts["train_images_left_out"]) == (4, 3, 3)
    cache = ("-o", f"encoder.cache={tmp_path / 'cache'}")
    counts = counts_of(zinit, tmp_path / "run", "--method", "v1-multimodal", *data, *cache)
    assert (counts["read"], counts["train_with_image"], counts["held_out_with_image"]) == (4, 3, 1)
    shown = ("--image", folder / "mllm_demo_data" / "1.jpg", "--image", folder / "mllm_demo_data" / "2.jpg")
    asked = ("generate", tmp_path / "run", "--prompt", "Who?", "--max-new-tokens", 4, "--temperature", 0, "--json")
    done = zinit(*asked, *shown)
    assert done.code == 0, done.err
    assert json.loads(done.out)["images"] == list(map(str, shown[1::2]))
    assert zinit(*asked).code == 0, "a question without an image"
    done = zinit(*asked, "--image", folder / "mllm_demo.json")
    assert done.code == 2
    assert "mllm_demo.json is no image that can be read" in done.err
    done = zinit("train", "--backbone", "llama", "--task", "conversation", *BRIEF, *data, "--output", tmp_path / "no")
    assert done.code == 2
    assert "4 examples have images, and the method takes none" in done.err
