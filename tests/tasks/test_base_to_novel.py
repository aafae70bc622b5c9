"""Base to novel: what is read, the protocol, the model's features, a whole run."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional as F

import zinit
from zinit import demo
from zinit.config import PrefixConfig, TrainConfig
from zinit.engine import make_accelerator
from zinit.errors import BackboneError, ConfigError, DataError
from zinit.hosts import ClipProcessor, load_clip
from zinit.images import read_image
from zinit.run import evaluate_run, train_run
from zinit.settings import RunConfig, list_presets, read_preset, resolve
from zinit.tasks import _crops
from zinit.tasks.base_to_novel import BaseToNovel, BaseToNovelConfig
from zinit.tasks.base_to_novel_table import harmonic_mean, paper_results, summarise

SHARED = Path(__file__).parents[3] / "shared"
CALTECH = SHARED / "data" / "caltech101" / "101_ObjectCategories"
SIZE = 32
ACCOUNTED = (
    *("dropped", "unused", "train", "train_not_drawn", "train_skipped_unreadable", "train_of_novel_classes"),
    *("base_test", "novel_test", "test_skipped_unreadable"),
)


def tokenizer() -> Any:
    """One token per byte between <s> and </s>, as CLIP's text tower wants it."""
    vocabulary = {
        token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def clip() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shape, "vocab_size": 264, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**shape, "image_size": SIZE, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text | {"pad_token_id": 2}, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(config)
    with torch.no_grad():  # freshly made towers hardly tell inputs apart
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def picture(seed: int, width: int = 40, height: int = 36) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def folders(root: Path, classes: int = 5, each: int = 6, start: int = 0) -> Path:
    for label in range(classes):
        folder = root / f"kind_{label}"
        folder.mkdir(parents=True)
        for i in range(each):
            picture(start + 100 * label + i).save(folder / f"{i}.png")
    return root


def task(data: Path | str | None, model: Any = None, *, seed: int = 0, labels: Any = None, **settings: Any) -> Any:
    settings = {"shots": 2} | settings
    return BaseToNovel(
        model or clip(),
        ClipProcessor(tokenizer()),
        None,
        BaseToNovelConfig(**settings),
        data=None if data is None else str(data),
        seed=seed,
        labels=labels,
    )


def accounted(t: Any) -> bool:
    counts = t.data_report()
    held_out = counts["base_test"] + counts["novel_test"]
    return counts["read"] == sum(counts[name] for name in ACCOUNTED) and counts["held_out"] == held_out


def evaluate(t: Any, limit: int | None = None) -> Any:
    return t.evaluate(make_accelerator(TrainConfig()), limit=limit)


# --- data ---------------------------------------------------------------------------------------------------------


def test_class_folders_are_split_in_halves_that_no_seed_moves(tmp_path: Path) -> None:
    t = task(folders(tmp_path, each=7))
    assert t.labels == [f"kind_{i}" for i in range(5)]
    assert t.classes == {"base": ["kind_0", "kind_1", "kind_2"], "novel": ["kind_3", "kind_4"]}  # ceil(5 / 2)
    counts = t.data_report()
    assert (counts["read"], counts["base_test"], counts["novel_test"]) == (35, 9, 6)
    assert (counts["train"], counts["train_not_drawn"], counts["train_of_novel_classes"]) == (6, 6, 8)
    assert accounted(t)
    again = task(tmp_path, seed=7)
    assert again._tested["base"][0].pictures == t._tested["base"][0].pictures
    other = task(tmp_path, split_seed=7)
    assert other._tested["base"][0].pictures != t._tested["base"][0].pictures
    tested = {*t._tested["base"][0].pictures, *t._tested["novel"][0].pictures}
    assert not tested & set(t._train.pictures)


def test_the_seed_decides_the_shots(tmp_path: Path) -> None:
    folders(tmp_path, each=8)
    first, same, other = (task(tmp_path, seed=seed) for seed in (1, 1, 2))
    assert first._train.pictures == same._train.pictures
    assert first._train.pictures != other._train.pictures
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()
    assert first._train_labels == [0, 0, 1, 1, 2, 2]
    for path, label in zip(first._train.pictures, first._train_labels, strict=True):
        assert path.parent.name == f"kind_{label}"


def test_own_train_and_test_folders(tmp_path: Path) -> None:
    folders(tmp_path / "train", classes=4, each=3)
    folders(tmp_path / "test", classes=4, each=2, start=50)
    t = task(tmp_path)
    assert {path.parents[1].name for path in t._train.pictures} == {"train"}
    assert {path.parents[1].name for path in t._tested["novel"][0].pictures} == {"test"}
    assert (t.data_report()["base_test"], t.data_report()["novel_test"]) == (4, 4)
    assert accounted(t)


def split_file(root: Path, **changes: Any) -> Path:
    """Labels in another order than the names, one left out, as such files may have them."""
    folders(root / "pictures", classes=4, each=4)
    entries = [[f"kind_{c}/{i}.png", 9 - 2 * c, f"kind {c}"] for c in range(4) for i in range(4)]
    document = {"train": [e for e in entries if e[0][-5] in "01"], "val": [e for e in entries if e[0][-5] == "2"]}
    document["test"] = [e for e in entries if e[0][-5] == "3"]
    file = root / "split_zhou_Kinds.json"
    file.write_text(json.dumps(document | changes))
    return file


def test_split_files_of_coop(tmp_path: Path) -> None:
    file = split_file(tmp_path)
    for data in (file, tmp_path):
        t = task(data, folder="pictures")
        assert t.classes == {"base": ["kind 3", "kind 2"], "novel": ["kind 1", "kind 0"]}  # by label: 3, 5, 7, 9
        found = {f"{path.parent.name}/{path.name}" for path in t._train.pictures}
        assert found == {"kind_3/0.png", "kind_3/1.png", "kind_2/0.png", "kind_2/1.png"}
        assert t.data_report()["unused"] == 4  # val
        assert accounted(t)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": [["../x.png", 3, "kind 3"]]}, "leaves the folder"),
        ({"test": [["x.png", "3", "kind 3"]]}, r"test, entry 1: expected \[path, label, class name\]"),
        ({"test": [["x.png", 3, "kind 2"]]}, "label 3 is 'kind 2' here and 'kind 3' before"),
        ({"test": [["x.png", 8, "kind 3"]]}, "several labels share the class name 'kind 3'"),
        ({"train": None}, 'expected {"train"'),
    ],
)
def test_wrong_split_files_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task(split_file(tmp_path, **changes), folder="pictures")


def rows(feature: Any, classes: int = 4, each: int = 4) -> Any:
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    labels = [c for c in range(classes) for _ in range(each)]
    named = labels if hasattr(feature, "names") else [f"kind {c}" for c in labels]
    features = Features({"picture": ImageFeature(), "kind": feature})
    return Dataset.from_dict({"picture": [picture(i) for i in range(len(labels))], "kind": named}, features=features)


def test_parquet_and_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    named = rows(datasets.ClassLabel(names=["z", "y", "x", "w"]))
    named.to_parquet(tmp_path / "data.parquet")
    t = task(tmp_path / "data.parquet", fields=("picture", "kind"))
    assert t.labels == ["z", "y", "x", "w"]
    assert accounted(t)
    position = int(t._train.pictures[0].name.rpartition(" ")[2]) - 1
    expected = torch.from_numpy(np.asarray(_crops.plain(picture(position), SIZE)).transpose(2, 0, 1).copy())
    assert torch.equal(t._train[0], expected)
    both = datasets.DatasetDict(train=named, validation=named.select(range(0, 16, 4)))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split=None: both if split is None else both[split])
    t = task("someone/kinds", fields=("picture", "kind"))
    assert (t.data_report()["base_test"], t.data_report()["novel_test"], t.data_report()["train"]) == (2, 2, 4)
    assert task("someone/kinds:train", fields=("picture", "kind")).data_report()["read"] == 16
    both = datasets.DatasetDict(train=rows(datasets.Value("string")))
    assert task("someone/kinds", fields=("picture", "kind")).labels == [f"kind {i}" for i in range(4)]
    with pytest.raises(DataError, match="has no field 'image'; it has picture, kind"):
        task("someone/kinds")
    numbers = both["train"].remove_columns("kind").add_column("kind", [0] * 16)
    both = datasets.DatasetDict(train=numbers)
    with pytest.raises(DataError, match="expected the names of the classes"):
        task("someone/kinds", fields=("picture", "kind"))


def test_a_truncated_picture_in_parquet_names_its_record(tmp_path: Path) -> None:
    import datasets

    file = io.BytesIO()
    picture(0).save(file, "JPEG")
    whole = file.getvalue()
    cells = [{"bytes": whole[: len(whole) // 2] if i == 5 else whole, "path": None} for i in range(16)]
    table = datasets.Dataset.from_dict({"image": cells, "label": [f"k{i // 4}" for i in range(16)]})
    table.to_parquet(tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"data\.parquet, record 6 is damaged or truncated"):
        task(tmp_path / "data.parquet")


def demo_data() -> tuple[list[str], dict[str, list[tuple[Image.Image, int]]]]:
    part = [(picture(10 * label + i), label) for label in range(4) for i in range(3)]
    return ["red_disc", "blue disc", "disc", "box"], {"train": part, "test": part[::3]}


def test_demo_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "base_to_novel", demo_data, raising=False)
    t = task(None)
    assert t.classes == {"base": ["red_disc", "blue disc"], "novel": ["disc", "box"]}
    assert t.data_report() | {"read": 16, "train": 4, "base_test": 2, "novel_test": 2} == t.data_report()
    assert evaluate(t).samples[0]["expected"] == "red disc"


def test_caltech101() -> None:
    if not CALTECH.is_dir():
        pytest.skip("needs ../shared/data/caltech101")
    drop = "BACKGROUND_Google,Faces_easy"
    t = task(CALTECH, drop_classes=drop, shots=3)
    counts = t.data_report()
    assert counts["read"] == sum(1 for _ in CALTECH.rglob("*.jpg")) == 816
    assert (counts["dropped"], counts["base_classes"], counts["novel_classes"]) == (16, 50, 50)
    assert (counts["train"], counts["base_test"], counts["novel_test"]) == (150, 200, 200)
    assert accounted(t)
    assert not {"BACKGROUND_Google", "Faces_easy"} & set(t.labels)
    with pytest.raises(ConfigError, match=r"no class 'Faces_eazy'\. Did you mean 'Faces_easy'"):
        task(CALTECH, drop_classes="Faces_eazy")
    with pytest.raises(DataError, match="has 4 images for 16 shots"):
        task(CALTECH, shots=16)


def test_too_few_pictures_for_the_shots(tmp_path: Path) -> None:
    folders(tmp_path / "train", classes=4, each=16)
    folders(tmp_path / "test", classes=4, each=1)
    for i in range(1, 16):
        (tmp_path / "train" / "kind_1" / f"{i}.png").unlink()
    with pytest.raises(DataError, match="class 'kind_1' has 1 image for 16 shots"):
        task(tmp_path, shots=16)
    t = task(tmp_path, shots=16, few="use_all")
    assert t._train_labels == [0] * 16 + [1]
    assert t.data_report()["classes_with_fewer_shots"] == 1
    assert accounted(t)


def test_bad_pictures_are_named_or_counted(tmp_path: Path) -> None:
    folders(tmp_path / "train", classes=4, each=3)
    folders(tmp_path / "test", classes=4, each=3)
    bad = tmp_path / "train" / "kind_0" / "0.png"
    for file in (bad, tmp_path / "test" / "kind_3" / "0.png"):
        file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DataError, match=r"0\.png is damaged or truncated"):
        task(tmp_path, shots=3)
    t = task(tmp_path, on_bad="skip")  # another picture is drawn in its place
    assert t._train_labels == [0, 0, 1, 1]
    assert bad not in t._train.pictures
    assert t.data_report()["test_skipped_unreadable"] == 1
    assert t.data_report()["novel_test"] == 5
    assert accounted(t)
    with pytest.raises(DataError, match="class 'kind_0' has 2 images for 3 shots"):
        task(tmp_path, shots=3, on_bad="skip")


def test_other_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no"):
        task(tmp_path / "nothing")
    with pytest.raises(DataError, match="at least two each"):
        task(folders(tmp_path / "a", classes=3))
    for settings in ({"template": "a photo"}, {"shots": 0}, {"few": "some"}, {"crop_scale": 0.0}, {"fields": ("a",)}):
        with pytest.raises(ConfigError):
            BaseToNovelConfig(**settings)  # pyright: ignore
    with pytest.raises(DataError, match="the text tower has room for 64"):
        task(folders(tmp_path / "b"), template="a very long sentence, which goes on and on and on, about a {}.")


def test_data_of_other_classes_is_refused_for_a_finished_run(tmp_path: Path) -> None:
    mine = folders(tmp_path / "a", classes=4)
    labels = task(mine).labels
    other = folders(tmp_path / "b", classes=5, each=2)
    with pytest.raises(DataError, match="has the classes kind_4, which are not among the 4 of the run"):
        task(mine, labels=labels, held_out_data=str(other))
    config = BaseToNovelConfig(shots=2, held_out_data=str(other), drop_classes="kind_4")
    t = BaseToNovel(clip(), ClipProcessor(tokenizer()), None, config, data=None, seed=0, train=False, labels=labels)
    assert (t.data_report()["base_test"], t.data_report()["novel_test"], len(t.train_stream)) == (4, 4, 0)
    assert accounted(t)


# --- pixels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 36), (31, 90), (32, 32), (200, 65)])
def test_plain_pictures_are_those_of_the_reference_processor(shape: tuple[int, int]) -> None:
    size = {"shortest_edge": SIZE}
    crop = {"height": SIZE, "width": SIZE}
    processor = transformers.CLIPImageProcessorPil(size=size, crop_size=crop, do_normalize=False, do_rescale=False)  # pyright: ignore
    image = picture(0, *shape)
    expected = np.asarray(processor(image)["pixel_values"][0]).round().astype(np.uint8)
    assert np.array_equal(np.asarray(_crops.plain(image, SIZE)).transpose(2, 0, 1), expected)


def test_views_are_functions_of_seed_picture_and_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, classes=4)
    t = task(tmp_path, views=3)
    assert len(t.train_stream) == 3 * len(t._train.pictures) == 12
    assert t._train_labels == [0, 0, 1, 1] * 3
    made = torch.stack(list(t._train))
    assert made.shape == (12, 3, SIZE, SIZE)
    assert len({view.numpy().tobytes() for view in made}) == 12
    assert torch.equal(t.collate(t.train_stream, [5, 2])["pixels"], made[[5, 2]])
    monkeypatch.setattr("zinit.images.KEPT_BYTES", 2 * 3 * SIZE * SIZE)  # two views stay, the others are made again
    lean = task(tmp_path, views=3)
    assert len(lean._train._made) == 2
    assert torch.equal(torch.stack(list(lean._train)), made)


def test_a_crop_is_a_part_of_the_picture() -> None:
    import random

    ramp = np.add.outer(np.arange(60), 3 * np.arange(60)).astype(np.uint8)  # a linear ramp: every crop is one too
    image = Image.fromarray(np.stack([ramp] * 3, axis=-1))
    covered = []
    for seed in range(60):
        values = np.asarray(_crops.random_crop(image, 16, 0.25, random.Random(seed)), dtype=float)[..., 0]
        rise, run = (values[-4] - values[3]).mean() / 9, (values[:, -4] - values[:, 3]).mean() / 9
        covered.append(abs(rise * 16) * abs(run * 16) / 3 / 3600)
        assert math.isclose(abs(rise) * 3 / abs(run), 1, abs_tol=0.45)  # the aspect lies within 3/4 and 4/3
        covered[-1] = math.copysign(covered[-1], run)
    assert 0.2 < min(map(abs, covered)) < 0.45
    assert 0.8 < max(map(abs, covered)) < 1.05
    assert 15 < sum(value < 0 for value in covered) < 45  # mirrored


# --- the model ----------------------------------------------------------------------------------------------------


def test_zero_shot_logits_are_the_models_own(tmp_path: Path) -> None:
    model = clip()
    t = task(folders(tmp_path), model)
    batch = t.collate(t.held_out_stream, [0, 4, 7])
    prompts = [f"a photo of a kind {i}." for i in range(3)]
    encoded = tokenizer()(prompts, padding=True, return_tensors="pt")
    files = [t._tested["base"][0].pictures[i] for i in (0, 4, 7)]
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


def test_a_run_from_end_to_end(saved: Path, tmp_path: Path) -> None:
    data = folders(tmp_path / "data")
    config = RunConfig(
        backbone="clip",
        task="base-to-novel",
        model=str(saved),
        data=str(data),
        prefix=PrefixConfig(length=3),
        train=TrainConfig(steps=8, warmup_steps=1, batch_size=9, micro_batch_size=5, learning_rate=0.03),
        options=BaseToNovelConfig(shots=3),  # 9 pictures: every step sees all of them
    )
    results = train_run(config, tmp_path / "run")
    frozen, adapted = results["metrics"]["frozen"], results["metrics"]["adapted"]
    assert {"base_accuracy", "novel_accuracy", "harmonic_mean", "loss"} <= set(frozen)
    assert adapted["loss"] != frozen["loss"]
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [event["loss"] for event in events if event["event"] == "step"]
    assert steps[-1] < steps[0]
    assert len(results["samples"]) == 8
    assert all("adapted" in sample for sample in results["samples"])
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
    assert results["adapted"]["loss"] != results["frozen"]["loss"]
    again = evaluate_run(tmp_path / "run")["metrics"]
    assert again["adapted"] == pytest.approx(results["adapted"])
    assert again["frozen"] == pytest.approx(results["frozen"])


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
