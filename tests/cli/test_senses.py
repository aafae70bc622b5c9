"""Real sounds and images through the command line, by tiny random encoders: trained on, evaluated, asked about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Zinit
from tests.encoders.senses import saved
from tests.shared import SHARED, needs_data

EXAMPLES = SHARED / "data" / "examples"
BRIEF = ("-o", "steps=2", "-o", "warmup_steps=0", "-o", "batch_size=3", "-o", "task.max_new_tokens=2",
         "-o", "task.held_out=2", "-o", "prefix.length=2", "-o", "task.template=vicuna")  # fmt: skip
SOUNDS = [f"imagebind/{name}_audio.wav" for name in ("bird", "car", "dog")] + ["imagebind_llm/girl_bgm.wav"]
FRAMES = ["imagebind/bird_image.jpg", "imagebind/car_image.jpg", "imagebind/dog_image.jpg", "imagebind_llm/girl.jpg"]


def talks(folder: Path, sense: str, files: list[str]) -> Path:
    """Twenty records: of the one column, of several files at once, and of a turn in parts."""
    answer = {"role": "assistant", "content": "A thing."}
    records: list[dict[str, object]] = [
        {sense: file, "messages": [{"role": "user", "content": f"<{sense}>What is it?"}, answer]} for file in files
    ]
    both = {f"{sense}s": files[:2], "instruction": f"<{sense}><{sense}>Are they alike?", "output": "No."}
    parts = [{"type": sense, sense: files[0]}, {"type": "text", "text": "What?"}]
    records += [both, {"messages": [{"role": "user", "content": parts}, answer]}]
    missing = {sense: "gone.wav", "messages": [{"role": "user", "content": f"<{sense}>What is it?"}, answer]}
    made = [*records, missing]
    for number in range(20 - len(made)):
        made.append({**records[number % len(files)], "category": str(number)})
    (folder / "talks.json").write_text(json.dumps(made))
    return folder / "talks.json"


def clips(folder: Path) -> list[str]:
    """Two videos of the real images, at one size."""
    for clip, order in (("there", 1), ("back", -1)):
        (folder / clip).mkdir()
        for number, name in enumerate(FRAMES[::order]):
            Image.open(EXAMPLES / name).resize((64, 48)).save(folder / clip / f"{number}.jpg")
    return ["there", "back"]


@needs_data
@pytest.mark.parametrize("kind", ["ast", "whisper", "clap", "videomae"])
def test_trained_evaluated_and_asked_about(kind: str, zinit: Zinit, model: Path, tmp_path: Path) -> None:
    sense, files, folder = "audio", SOUNDS, EXAMPLES
    if kind == "videomae":
        sense, files, folder = "video", clips(tmp_path), tmp_path
    else:
        pytest.importorskip("soundfile")
    run, data = tmp_path / "run", talks(tmp_path, sense, files)
    done = zinit(
        "train", "--backbone", "llama", "--model", model, "--task", "conversation", "--method", "v1-multimodal",
        "--encoder", saved(kind, tmp_path / kind), "--data", data, *BRIEF, "-o", f"task.image_folder={folder}",
        "-o", f"encoder.cache={tmp_path / 'cache'}", "-o", "context.layers=1", "-o", "learning_rate=0.1",
        "--output", run,
    )  # fmt: skip
    assert done.code == 0, done.err
    metrics = json.loads((run / "metrics.json").read_text())
    counts = metrics["counts"]
    assert (counts["read"], counts[f"skipped_missing_{sense}"]) == (20, 1), counts
    assert counts["read"] == counts["train"] + counts["held_out"] + sum(n for k, n in counts.items() if "skipped" in k)
    assert (counts["train_with_image"], counts["held_out_with_image"]) == (counts["train"], counts["held_out"])
    losses = [metrics["metrics"][name]["loss"] for name in ("base", "adapted", "shuffled")]
    assert len(set(losses)) == 3, "one file is not another"
    asked = ("generate", run, "--prompt", "What?", "--max-new-tokens", 2, "--temperature", 0, "--json")
    shown = [item for file in files[:2] for item in (f"--{sense}", folder / file)]
    done = zinit(*asked, *shown)
    assert done.code == 0, done.err
    assert json.loads(done.out)["images"] == [str(folder / file) for file in files[:2]]
    refused = zinit(*asked, f"--{sense}", EXAMPLES / "mllm_demo" / "mllm_demo.json")
    assert (refused.code, "mllm_demo.json" in refused.err) == (2, True), refused.err
    assert "Traceback" not in refused.err
