"""Base to novel: the protocol, the model's features, whole runs, and the paper's table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional as F

import zinit
from tests.tasks.clip import SIZE, clip, evaluate, folders, task, tokenizer
from zinit import demo
from zinit.config import PrefixConfig
from zinit.data import crops as _crops
from zinit.data.images import read_image
from zinit.errors import BackboneError, ConfigError, DataError
from zinit.models.loading import ClipProcessor, load_clip
from zinit.runs.config import RunConfig
from zinit.runs.evaluate import evaluate_run
from zinit.runs.presets import list_presets, read_preset
from zinit.runs.settings import resolve
from zinit.runs.train import train_run
from zinit.tasks.base_to_novel.table import harmonic_mean, paper_results, summarise
from zinit.tasks.base_to_novel.task import BaseToNovelConfig
from zinit.train.config import TrainConfig

# --- the model ----------------------------------------------------------------------------------------------------


def test_zero_shot_logits_are_the_models_own(tmp_path: Path) -> None:
    model = clip()
    t = task(folders(tmp_path), model)
    batch = t.collate(t.held_out_stream, [0, 4, 7])
    prompts = [f"a photo of a kind {i}." for i in range(3)]
    encoded = tokenizer()(prompts, padding=True, return_tensors="pt")
    files = [t._tested["base"][0].sources[i] for i in (0, 4, 7)]
    processor = transformers.CLIPImageProcessorPil(  # pyright: ignore
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    pixels = processor([read_image(file) for file in files], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], pixel_values=pixels
        ).logits_per_image
        torch.testing.assert_close(t.logits(batch, "base"), expected, rtol=1e-4, atol=1e-4)
        loss = F.cross_entropy(expected, batch["labels"], reduction="sum")
        torch.testing.assert_close(t(batch), loss, rtol=1e-4, atol=1e-4)


def test_features_of_several_templates_are_averaged(tmp_path: Path) -> None:
    folders(tmp_path)
    whole = task(tmp_path, template=("a {}.", "one more {}, drawn."))
    parts = [task(tmp_path, template=template).class_features("novel") for template in whole.config.template]
    torch.testing.assert_close(whole.class_features("novel"), F.normalize(parts[0] + parts[1], dim=-1))


def naive(model: Any, data: Path, shots: int) -> tuple[float, float]:
    """The protocol in plain words: half of the sorted classes each, every half among its own classes."""
    names = sorted(folder.name for folder in (data / "test").iterdir())
    accuracies = []
    for part in (names[: math.ceil(len(names) / 2)], names[math.ceil(len(names) / 2) :]):
        right = total = 0
        for truth, name in enumerate(part):
            for file in (data / "test" / name).iterdir():
                pixels = torch.from_numpy(np.array(_crops.plain(Image.open(file).convert("RGB"), SIZE)))
                pixels = pixels.permute(2, 0, 1).float() / 255
                processor = ClipProcessor(None)
                pixels = (pixels - torch.tensor(processor.mean)[:, None, None]) / torch.tensor(processor.std)[
                    :, None, None
                ]
                scores = []
                for other in part:
                    ids = tokenizer()([f"a photo of a {other.replace('_', ' ')}."], return_tensors="pt")["input_ids"]
                    scores.append(model(input_ids=ids, pixel_values=pixels[None]).logits_per_image.item())
                right += scores.index(max(scores)) == truth
                total += 1
        accuracies.append(right / total)
    return accuracies[0], accuracies[1]


@torch.no_grad()
def test_accuracies_follow_the_protocol(tmp_path: Path) -> None:
    folders(tmp_path / "train", classes=5, each=2)
    folders(tmp_path / "test", classes=5, each=6, start=31)
    model = clip()
    found = evaluate(task(tmp_path, model))
    base, novel = naive(model, tmp_path, 2)
    assert 0 < base < 1
    assert 0 < novel < 1
    assert (found.metrics["base_accuracy"], found.metrics["novel_accuracy"]) == (base, novel)
    assert found.metrics["harmonic_mean"] == pytest.approx(2 * base * novel / (base + novel))
    assert found.counts == {"base_answered": 18, "novel_answered": 12}
    assert [sample["prompt"].split("/")[0] for sample in found.samples] == [
        *("kind_0", "kind_0", "kind_1", "kind_2", "kind_3", "kind_3", "kind_4", "kind_4")
    ]
    limited = evaluate(task(tmp_path, model), limit=6)
    assert limited.counts == {"base_answered": 6, "novel_answered": 6}
    assert evaluate(task(tmp_path, model), limit=0).metrics == {}


@pytest.mark.parametrize("towers", [None, ("text_model",), ("vision_model",)])
def test_gradients_reach_the_prefixes_and_kept_features_never_go_stale(
    tmp_path: Path, towers: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders(tmp_path)
    model = clip()
    handle = zinit.attach(model, PrefixConfig(length=3, towers=towers, gate_init=0.3))
    t = task(tmp_path, model)
    plain = task(tmp_path, model)
    monkeypatch.setattr(plain, "_may_change", lambda tower: True)
    optimizer = torch.optim.SGD(handle.parameters(), lr=1.0)
    losses = []
    for _ in range(3):
        for stream in ("train_stream", "held_out_stream"):
            for indices in ([0, 1, 2], [1, 3]):
                batch = t.collate(getattr(t, stream), indices)
                torch.testing.assert_close(t(batch), plain(batch))
        assert evaluate(t).metrics == evaluate(plain).metrics
        optimizer.zero_grad()
        loss = t(t.collate(t.train_stream, range(6)))
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in handle.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert len(set(losses)) == 3
    with handle.disabled():
        batch = t.collate(t.held_out_stream, [0, 1])
        frozen = task(tmp_path, clip())
        torch.testing.assert_close(t(batch), frozen(batch))


def test_a_sharded_tower_runs_at_every_call(tmp_path: Path) -> None:
    """Every process calls it equally often, whichever images it has seen."""
    model = clip().requires_grad_(False)
    t = task(folders(tmp_path), model)
    next(model.vision_model.parameters()).ds_id = 0  # as DeepSpeed marks what it shards
    runs: list[int] = []
    model.vision_model.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(3):
        t(t.collate(t.train_stream, [0, 1]))
    assert len(runs) == 3


def test_a_frozen_tower_runs_once(tmp_path: Path) -> None:
    model = clip()
    zinit.attach(model, PrefixConfig(length=3, towers=("vision_model",)))
    t = task(folders(tmp_path), model)
    runs: dict[str, int] = {"text": 0, "vision": 0}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            runs[name] += 1

        return hook

    model.text_model.register_forward_hook(count("text"))
    model.vision_model.register_forward_hook(count("vision"))
    for _ in range(3):
        t(t.collate(t.train_stream, [0, 1]))
    assert runs == {"text": 1, "vision": 3}
    model.text_model.requires_grad_(True)  # no longer frozen
    t(t.collate(t.train_stream, [0, 1]))
    t(t.collate(t.train_stream, [0, 1]))
    assert runs == {"text": 3, "vision": 5}


def test_bfloat16(tmp_path: Path) -> None:
    model = clip().to(torch.bfloat16)
    handle = zinit.attach(model, PrefixConfig(length=3))
    t = task(folders(tmp_path), model)
    batch = t.collate(t.train_stream, range(6))
    loss = t(batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert t.logits(batch, "base").dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in handle.parameters())
    expected = task(tmp_path, clip())(batch)
    torch.testing.assert_close(loss, expected, rtol=0.1, atol=0.5)


# --- models from disk, whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    clip().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return folder


def test_load_clip(saved: Path, tmp_path: Path) -> None:
    model, processor = load_clip(saved, dtype=torch.bfloat16)
    assert type(model).__name__ == "CLIPModel"
    assert model.logit_scale.dtype == torch.bfloat16  # pyright: ignore
    assert (processor.mean, processor.std) == ((0.5,) * 3, (0.25,) * 3)
    with pytest.raises(BackboneError, match="there is no model folder"):
        load_clip(tmp_path / "nothing", dtype=torch.float32)
    with pytest.raises(BackboneError, match="has no get_image_features, get_text_features, logit_scale"):
        load_clip(demo.llama_path(), dtype=torch.float32)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BackboneError, match="cannot be loaded as a dual encoder"):
        load_clip(tmp_path, dtype=torch.float32)


@torch.no_grad()
def test_a_tower_that_reads_the_padding_gets_all_of_it(saved: Path, tmp_path: Path) -> None:
    """SigLIP's tokenizers give no mask, and its text tower pools the last place, whatever stands there."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shape, "vocab_size": 264, "max_position_embeddings": 40, "projection_size": 32}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = transformers.SiglipConfig(text_config=text, vision_config={**shape, "image_size": SIZE, "patch_size": 8})
    transformers.SiglipModel(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"  # says so on the Hub as well
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_input_names": ["input_ids"]}))
    model, processor = load_clip(tmp_path / "model", dtype=torch.float32)
    t = task(folders(tmp_path / "data"), model, processor=processor)
    prompts = [f"a photo of a kind {i}." for i in range(3)]
    ids = torch.tensor([[0, *tokenizer()(p, add_special_tokens=False)["input_ids"], 1] for p in prompts])
    padded = F.pad(ids, (0, 40 - ids.shape[1]), value=2)
    features: Any = [F.normalize(model.get_text_features(input_ids=i).pooler_output) for i in (padded, ids)]  # pyright: ignore
    torch.testing.assert_close(t.class_features("base"), features[0])
    assert not torch.allclose(features[0], features[1], atol=1e-3)
    assert load_clip(saved, dtype=torch.float32)[1].padding == "longest"


def test_a_run_from_end_to_end(saved: Path, tmp_path: Path) -> None:
    data = folders(tmp_path / "data")
    config = RunConfig(
        backbone="clip",
        task="base-to-novel",
        model=str(saved),
        data=str(data),
        prefix=PrefixConfig(length=3),
        train=TrainConfig(steps=8, warmup_steps=1, batch_size=9, micro_batch_size=5, learning_rate=0.03),
        options=BaseToNovelConfig(shots=3),  # 9 images: every step sees all of them
    )
    results = train_run(config, tmp_path / "run")
    frozen, adapted = results["metrics"]["base"], results["metrics"]["adapted"]
    assert {"base_accuracy", "novel_accuracy", "harmonic_mean", "loss"} <= set(frozen)
    assert adapted["loss"] != frozen["loss"]
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [event["loss"] for event in events if event["event"] == "step"]
    assert steps[-1] < steps[0]
    assert len(results["samples"]) == 8
    assert all("adapted" in sample for sample in results["samples"])
    assert all(sample["image"].startswith("data:image/jpeg;base64,") for sample in results["samples"])
    again = evaluate_run(tmp_path / "run")
    assert again["metrics"]["adapted"] == pytest.approx(adapted)
    whole = evaluate_run(tmp_path / "run", data=str(data))
    assert whole["counts"]["base_test"] == 18  # all of it is tested on
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def run_with(method: str, saved: Path, data: Path) -> RunConfig:
    return RunConfig.from_dict(
        {
            "backbone": "clip",
            "model": str(saved),
            "data": str(data),
            "method": {"name": method},
            "train": {"steps": 2, "warmup_steps": 1, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 0.01},
            "task": {"name": "base-to-novel", "shots": 3},
        }
    )


@pytest.mark.parametrize("method", ["full", "bitfit", "lora", "bottleneck"])
def test_other_methods_train_the_towers(saved: Path, tmp_path: Path, method: str) -> None:
    results = train_run(run_with(method, saved, folders(tmp_path / "data")), tmp_path / "run")["metrics"]
    assert results["adapted"]["loss"] != results["base"]["loss"]
    again = evaluate_run(tmp_path / "run")["metrics"]
    assert again["adapted"] == pytest.approx(results["adapted"])
    assert again["base"] == pytest.approx(results["base"])


@pytest.mark.parametrize("method", ["head-only", "logistic-regression", "prompt-tuning"])
def test_methods_that_cannot_be_used_say_so(saved: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(ConfigError, match=r"nothing to train|no single token embedding"):
        train_run(run_with(method, saved, folders(tmp_path / "data")), tmp_path / "run")


def test_presets_and_options_resolve() -> None:
    for name in (name for name in list_presets() if name.startswith("base-to-novel/")):
        assert read_preset(name)["backbone"] == "clip"
        config, _ = resolve(preset=name, model="someone/clip", data="someone/data")
        assert config.task == "base-to-novel"
    options = ["task.drop_classes=BACKGROUND_Google,Faces_easy", "task.template=a photo of a {}, a type of flower."]
    config, _ = resolve(backbone="clip", model="someone/clip", data="someone/data", options=options)
    assert config.options.drop_classes == ("BACKGROUND_Google", "Faces_easy")
    assert config.options.template == ("a photo of a {}, a type of flower.",)


# --- the table ----------------------------------------------------------------------------------------------------


def test_the_papers_table_is_consistent() -> None:
    averages = {"CLIP": 80.15, "CoOp": 79.90, "CoCoOp": 83.55, "MaPLe": 84.02, "zero-init": 84.67}
    table = paper_results()
    assert set(table) == set(averages)
    for method, sets in table.items():
        for base, novel, mean in (sets[name] for name in ("ImageNet", "Caltech101", "Flowers102")):
            assert harmonic_mean(base, novel) == pytest.approx(mean, abs=0.0101)  # of rounded figures
        sets = dict(sets)
        average = sets.pop("average")
        rows = [{"data": name, "base_accuracy": b, "novel_accuracy": n} for name, (b, n, _) in sets.items()]
        found = summarise(rows)["average"]
        assert found["base_accuracy"] == pytest.approx(average[0], abs=0.0101)
        assert found["novel_accuracy"] == pytest.approx(average[1], abs=0.0101)
        assert found["harmonic_mean"] == pytest.approx(averages[method], abs=0.0101) == average[2]


def test_summary_averages_seeds_before_and_data_sets_after_the_harmonic_mean() -> None:
    cells = [("a", 0.9, 0.5), ("a", 0.7, 0.7), ("b", 0.4, 0.8)]
    found = summarise({"data": d, "base_accuracy": b, "novel_accuracy": n} for d, b, n in cells)
    assert found["a"]["harmonic_mean"] == pytest.approx(2 * 0.8 * 0.6 / 1.4)
    assert found["average"]["harmonic_mean"] == pytest.approx((0.96 / 1.4 + 0.64 / 1.2) / 2)
    assert harmonic_mean(0.0, 0.0) == 0.0
    with pytest.raises(DataError):
        summarise([])
