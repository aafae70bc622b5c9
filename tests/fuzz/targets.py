"""What is fuzzed: each target makes one wrong input and hands it to zinit. A new one is a function and a line below.

A target takes a generator of random numbers and an empty folder, and returns a call without arguments. The call must
return or raise a `ZinitError`; everything else is a finding.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image

import zinit
from tests.fuzz import mutate
from tests.golden.formats import K, litgpt_file, litgpt_tensors, llama, official_file, peft_folder, trained
from zinit.data.images import read_image
from zinit.data.labelled.parts import Reading
from zinit.data.labelled.sources import read_images
from zinit.data.records import read_records
from zinit.runs.settings import RunConfig, resolve
from zinit.tasks.ner.sentences import read_sentences
from zinit.tasks.squad.questions import read_questions

Call = Callable[[], Any]
Target = Callable[[Random, Path], Call]
BACKBONES = ("llama", "vit", "roberta", "clip")


@cache
def settings_of(backbone: str) -> dict[str, Any]:
    return json.loads(json.dumps(resolve(backbone=backbone)[0].to_dict()))


def names_of(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The settings as options name them."""
    for name, inner in values.items():
        yield prefix + name
        if isinstance(inner, dict):
            yield from names_of(inner, f"{prefix}{name}.")


def settings(rng: Random, folder: Path) -> Call:
    """The settings of a run, as ``run.json`` holds them."""
    values = mutate.document(rng, settings_of(rng.choice(BACKBONES)))
    return lambda: RunConfig.from_dict(values)


def options(rng: Random, folder: Path) -> Call:
    """``-o key=value``, one or two."""
    backbone = rng.choice(BACKBONES)
    names = [*names_of(settings_of(backbone)), "", "x", "train", "task.", ".length"]
    made = [
        f"{rng.choice(names)}={_text(rng)}" if rng.random() < 0.95 else _text(rng) for _ in range(rng.randint(1, 2))
    ]
    return lambda: resolve(backbone=backbone, options=made)


def _text(rng: Random) -> str:
    made = mutate.value(rng)
    return made if isinstance(made, str) else json.dumps(made)


def toml(rng: Random, folder: Path) -> Call:
    """A ``--config`` file."""
    lines = ['backbone = "llama"', "seed = 1", "", "[prefix]", "length = 4", "layers = 2", "", "[train]", "steps = 3",
             "learning_rate = 0.1", "", "[task]", 'name = "alpaca"', "held_out = 8"]  # fmt: skip
    if rng.random() < 0.5:
        at = rng.choice([i for i, line in enumerate(lines) if "=" in line])
        lines[at] = f"{lines[at].partition('=')[0]}= {_text(rng)}"
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
    else:
        data = mutate.content(rng, "\n".join(lines).encode())
    (folder / "config.toml").write_bytes(data)
    return lambda: resolve(config_file=str(folder / "config.toml"))


RECORDS = [{"instruction": f"Say {word}", "input": "", "output": word} for word in ("red", "blue", "green")]


def records(rng: Random, folder: Path) -> Call:
    """Alpaca's records as JSON, JSON lines or Parquet."""
    path = folder / f"data{rng.choice(('.json', '.jsonl', '.parquet'))}"
    if path.suffix == ".json":
        path.write_bytes(mutate.json_content(rng, RECORDS))
    elif path.suffix == ".jsonl":
        path.write_bytes(mutate.content(rng, "\n".join(map(json.dumps, RECORDS)).encode()))
    else:
        path.write_bytes(mutate.content(rng, parquet()))
    return lambda: read_records(str(path), required=("instruction", "output"), optional=("input",))


@cache
def parquet() -> bytes:
    from datasets import Dataset

    buffer = io.BytesIO()
    Dataset.from_list(RECORDS).to_parquet(buffer)
    return buffer.getvalue()


@cache
def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (12, 8), bytes(range(256))[: 12 * 8] * 3).save(buffer, format)
    return buffer.getvalue()


def image(rng: Random, folder: Path) -> Call:
    """An image file in one of the formats that zinit names."""
    suffix, format = rng.choice((("png", "PNG"), ("jpg", "JPEG"), ("gif", "GIF"), ("bmp", "BMP"), ("webp", "WEBP"),
                                 ("tif", "TIFF"), ("ppm", "PPM")))  # fmt: skip
    path = folder / f"image.{suffix}"
    path.write_bytes(mutate.content(rng, encoded(format)))
    return lambda: read_image(path)


def class_list(rng: Random, folder: Path) -> Call:
    """Lists of images and classes: CSV, CoOp's split file, VTAB-1k's lists."""
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        (folder / name / "0.png").write_bytes(encoded("PNG"))
    entries = [["cat/0.png", 0, "cat"], ["dog/0.png", 1, "dog"]]
    kind = rng.randrange(3)
    if kind == 0:
        source = folder / "data.csv"
        source.write_bytes(mutate.content(rng, b"image,label\ncat/0.png,cat\ndog/0.png,dog\n"))
    elif kind == 1:
        source = folder / "split_zhou_Pets.json"
        source.write_bytes(mutate.json_content(rng, dict.fromkeys(("train", "val", "test"), entries)))
    else:
        source = folder
        lines = b"cat/0.png 0\ndog/0.png 1\n"
        for name in ("train.txt", "test.txt"):
            (folder / name).write_bytes(mutate.content(rng, lines) if rng.random() < 0.7 else lines)
    reading = Reading(on_bad=rng.choice(("error", "skip")), named=rng.random() < 0.5)
    return lambda: read_images(str(source), reading, lambda: ([], {}))


def sentences(rng: Random, folder: Path) -> Call:
    """NER: a file in CoNLL's columns, or records."""
    if rng.random() < 0.5:
        path = folder / "data.conll"
        path.write_bytes(mutate.content(rng, b"-DOCSTART- O\n\nAda B-PER\nLovelace I-PER\n\nin O\nLondon B-LOC\n"))
    else:
        path = folder / "data.json"
        valid = [{"tokens": ["Ada", "slept"], "ner_tags": ["B-PER", "O"]}, {"tokens": ["Oslo"], "ner_tags": ["B-LOC"]}]
        path.write_bytes(mutate.json_content(rng, valid))
    columns = (rng.choice((0, 1, -1, 5)), rng.choice((-1, 1, -7)))
    return lambda: read_sentences(str(path), columns=columns, fields=("tokens", "ner_tags"), labels=None)


def questions(rng: Random, folder: Path) -> Call:
    """SQuAD: the nested document, or records."""
    answers = [{"text": "Oslo", "answer_start": 13}]
    asked = {"id": "a", "question": "Where?", "answers": answers, "is_impossible": False}
    nested = {
        "version": "v2.0",
        "data": [{"title": "t", "paragraphs": [{"context": "Ada lives in Oslo.", "qas": [asked]}]}],
    }
    flat = [
        {
            "id": "a",
            "context": "Ada lives in Oslo.",
            "question": "Where?",
            "answers": {"text": ["Oslo"], "answer_start": [13]},
        }
    ]
    path = folder / "data.json"
    path.write_bytes(mutate.json_content(rng, rng.choice((nested, flat))))
    skip_bad = rng.random() < 0.5
    return lambda: read_questions(str(path), skip_bad=skip_bad)


@cache
def host() -> Any:
    return llama()


def unchanged(load: Callable[[Any], zinit.Handle]) -> Call:
    """Loads onto one model that all inputs share; whatever comes of it, the model has no adapter afterwards."""

    def call() -> None:
        load(host()).detach()

    def checked() -> None:
        try:
            call()
        finally:
            left = [name for name, _ in host().named_parameters() if "zinit" in name]
            assert not left, f"the model keeps {left[0]}"

    return checked


@cache
def saved() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        trained(llama()).save(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def adapter(rng: Random, folder: Path) -> Call:
    """An adapter's folder: its JSON or its tensors."""
    for name, data in saved().items():
        (folder / name).write_bytes(data)
    wrong = rng.choice(("adapter.json", "adapter.safetensors"))
    data = saved()[wrong]
    changed = mutate.json_content(rng, json.loads(data)) if wrong.endswith("json") else _tensors(rng, data)
    (folder / wrong).write_bytes(changed)
    return unchanged(lambda model: zinit.load(model, folder))


def _tensors(rng: Random, data: bytes) -> bytes:
    """A safetensors file; half the changes are in its header, which is where they are noticed."""
    size = 8 + int.from_bytes(data[:8], "little")
    return mutate.content(rng, data[:size]) + data[size:] if rng.random() < 0.5 else mutate.content(rng, data)


def foreign(rng: Random, folder: Path) -> Call:
    """A file in another implementation's format."""
    torch.manual_seed(rng.randrange(2**31))
    format = rng.choice(("official-v1", "litgpt-legacy", "litgpt", "peft"))
    if format == "peft":
        path = peft_folder(folder / "peft")
        file = path / rng.choice(("adapter_config.json", "adapter_model.safetensors"))
    else:
        path = file = official_file(folder) if format == "official-v1" else litgpt_file(folder, litgpt_tensors())
    data = file.read_bytes()
    file.write_bytes(
        mutate.json_content(rng, json.loads(data)) if file.suffix == ".json" else mutate.content(rng, data)
    )
    chosen = format if rng.random() < 0.9 else rng.choice(("official-v1", "litgpt", "peft", "x"))
    return unchanged(lambda model: zinit.import_adapter(model, path, format=chosen, length=K))


TARGETS: dict[str, Target] = {
    "settings": settings,
    "options": options,
    "toml": toml,
    "records": records,
    "image": image,
    "class-list": class_list,
    "sentences": sentences,
    "questions": questions,
    "adapter": adapter,
    "foreign": foreign,
}


def clear(folder: Path) -> None:
    """Empties the folder for the next input."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
