"""What is fuzzed: each target makes one wrong input and hands it to zinit. A new one is a function and a line below.

A target takes a generator of random numbers and an empty folder, and returns a call without arguments. The call must
return or raise a `ZinitError`; everything else is a finding.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import zinit
from tests.fuzz import mutate
from tests.fuzz.image_text import captions, problems, talks
from tests.golden.formats import (
    TENSORS,
    K,
    llama,
    peft_folder,
    trained,
)
from zinit.adapter.registries import FORMATS
from zinit.bench.plan import Benchmark
from zinit.bench.summary import Row
from zinit.bench.write import as_csv, as_markdown
from zinit.config import to_json
from zinit.data.images import Images, read_image
from zinit.data.labelled.parts import Reading
from zinit.data.labelled.sources import read_images
from zinit.data.records import read_records
from zinit.errors import printable
from zinit.runs.directory import read_run
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
    """Alpaca's records as JSON, JSON lines, CSV or Parquet."""
    path = folder / f"data{rng.choice(('.json', '.jsonl', '.csv', '.parquet'))}"
    if path.suffix == ".json":
        path.write_bytes(mutate.json_content(rng, RECORDS))
    elif path.suffix == ".jsonl":
        path.write_bytes(mutate.content(rng, "\n".join(map(json.dumps, RECORDS)).encode()))
    elif path.suffix == ".csv":
        path.write_bytes(mutate.content(rng, b'instruction,input,output\nSay red,,red\n"Say, blue","a\nb",blue\n'))
    else:
        path.write_bytes(mutate.content(rng, parquet()) if rng.random() < 0.7 else odd_parquet(rng))
    return lambda: read_records(str(path), required=("instruction", "output"), optional=("input",))


@cache
def parquet() -> bytes:
    from datasets import Dataset

    buffer = io.BytesIO()
    Dataset.from_list(RECORDS).to_parquet(buffer)
    return buffer.getvalue()


def odd_parquet(rng: Random) -> bytes:
    """A Parquet file with a column of another type than text."""
    columns = {
        "instruction": pa.array(["Say red", "Say blue"]),
        "output": pa.array(["red", "blue"]),
        "input": rng.choice(
            [
                pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
                pa.array([2**62, -(2**62)], pa.timestamp("ms")),
                pa.array([{"a": [1]}, None]),
                pa.array([b"\xff", None]),
                pa.array([Decimal("1.5"), None]),
                pa.array([None, None], pa.null()),
                pa.array([1, 2], pa.duration("s")),
            ]
        ),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


@cache
def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    mode = "P" if format == "BLP" else "RGB"
    Image.frombytes("RGB", (12, 8), bytes(range(256))[: 12 * 8] * 3).convert(mode).save(buffer, format)
    return buffer.getvalue()


def image(rng: Random, folder: Path) -> Call:
    """An image file in one of the formats that zinit names, or in another under the same suffix."""
    suffix, format = rng.choice((("png", "PNG"), ("jpg", "JPEG"), ("gif", "GIF"), ("bmp", "BMP"), ("webp", "WEBP"),
                                 ("tif", "TIFF"), ("ppm", "PPM"), ("png", "EPS"), ("jpg", "AVIF"), ("bmp", "BLP"),
                                 ("gif", "PDF"), ("tif", "ICO")))  # fmt: skip
    path = folder / f"image.{suffix}"
    path.write_bytes(mutate.content(rng, encoded(format)))
    return lambda: read_image(path)


def class_folders(rng: Random, folder: Path) -> Call:
    """Folders of classes with what else lies in folders: hidden files, pipes, links, names without a meaning."""
    names = ["cat", "dog", ".cache", "__MACOSX", "train", "test", "val", "a\x1b[2J", "é" * 100]
    for name in rng.sample(names, rng.randint(0, 5)):
        (folder / name).mkdir()
        for number in range(rng.randint(0, 3)):
            path = folder / name / (str(number) + rng.choice((".png", ".JFIF", "", ".txt", ".parquet")))
            kind = rng.randrange(5)
            if kind == 0:
                os.mkfifo(path)
            elif kind == 1:
                path.symlink_to(rng.choice((folder, path, Path("/dev/zero"), Path("nowhere"))))
            else:
                path.write_bytes(encoded("PNG") if kind == 2 else mutate.content(rng, encoded("JPEG")))
    source = str(folder) if rng.random() < 0.8 else rng.choice(("x" * 5000, "~nobody/x", "\x00", "json", "a" * 300))
    reading = Reading(on_bad=rng.choice(("error", "skip")), fewest=rng.choice((1, 2)))

    def call() -> None:
        parts = read_images(source, reading, lambda: ([], {}))
        Images([example.image for example in parts], lambda image: image.resize((4, 4)), on_bad="skip")

    return call


def class_list(rng: Random, folder: Path) -> Call:
    """Lists of images and classes: CSV, CoOp's split file, VTAB-1k's lists."""
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        (folder / name / "0.png").write_bytes(encoded("PNG"))
    os.mkfifo(folder / "cat" / "1.png")
    entries = [["cat/0.png", 0, "cat"], ["dog/0.png", 1, "dog"], ["cat/1.png", 0, "cat"]]
    kind = rng.randrange(3)
    if kind == 0:
        source = folder / "data.csv"
        source.write_bytes(mutate.content(rng, b"image,label\ncat/0.png,cat\ndog/0.png,dog\n"))
    elif kind == 1:
        source = folder / "split_zhou_Pets.json"
        source.write_bytes(mutate.json_content(rng, dict.fromkeys(("train", "val", "test"), entries)))
    else:
        source = folder
        lines = b"cat/0.png 0\ndog/0.png 1\ncat/1.png 0\n"
        for name in ("train.txt", "test.txt"):
            (folder / name).write_bytes(mutate.content(rng, lines) if rng.random() < 0.7 else lines)
    reading = Reading(on_bad=rng.choice(("error", "skip")), named=rng.random() < 0.5)

    def call() -> None:
        parts = read_images(str(source), reading, lambda: ([], {}))
        Images([example.image for example in parts], lambda image: image.resize((4, 4)), on_bad="skip")

    return call


def sentences(rng: Random, folder: Path) -> Call:
    """NER: a file in CoNLL's columns, records, or a table."""
    kind = rng.randrange(5)
    if kind == 0:
        path = folder / "data.csv"
        path.write_bytes(mutate.content(rng, b"tokens,ner_tags\nAda slept,B-PER O\nOslo,U-LOC\n"))
    elif kind <= 2:
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
    if wrong.endswith("tensors") and rng.random() < 0.7:  # past the check of the hash
        description = json.loads(saved()["adapter.json"]) | {"sha256": hashlib.sha256(changed).hexdigest()}
        (folder / "adapter.json").write_text(json.dumps(description))
    return unchanged(lambda model: zinit.load(model, folder))


def _tensors(rng: Random, data: bytes) -> bytes:
    """A safetensors file; half the changes are in its header, which is where they are noticed."""
    if rng.random() < 0.3:
        return data.replace(b'"F32"', rng.choice((b'"BF9"', b'"I32"', b'"U32"', b'"F4" ', b'"C64"')))
    size = 8 + int.from_bytes(data[:8], "little")
    return mutate.content(rng, data[:size]) + data[size:] if rng.random() < 0.5 else mutate.content(rng, data)


def foreign(rng: Random, folder: Path) -> Call:
    """A file in another implementation's format."""
    torch.manual_seed(rng.randrange(2**31))
    format, options = rng.choice((*TENSORS, "peft")), {}
    if format == "peft":
        path = peft_folder(folder / "peft")
        file = path / rng.choice(("adapter_config.json", "adapter_model.safetensors"))
        change = mutate.json_content if file.suffix == ".json" else mutate.content
        file.write_bytes(change(rng, json.loads(file.read_bytes()) if file.suffix == ".json" else file.read_bytes()))
    else:
        make, options = TENSORS[format]
        path, is_whole = folder / "adapter.pth", rng.random() < 0.7
        torch.save({"model": odd_tensors(rng, make()) if is_whole else make()}, path)
        path.write_bytes(path.read_bytes() if is_whole else mutate.content(rng, path.read_bytes()))
    if rng.random() < 0.1:
        format, options = rng.choice((*FORMATS, "x")), {}
    return unchanged(lambda model: zinit.import_adapter(model, path, format=format, length=K, **options))


def odd_tensors(rng: Random, tensors: dict[str, Any]) -> dict[str, Any]:
    """An adapter one of whose tensors is missing, has another name, or is not what it claims to be."""
    name = rng.choice(list(tensors))
    plain = tensors.pop(name)
    odd = [
        None,
        torch.zeros(1).expand(2**40),
        torch.zeros(1, 1).expand(2**40, plain.shape[-1]),
        torch.zeros(1).expand(plain.shape),
        torch.tensor(1.0),
        torch.zeros(*plain.shape, 3),
        torch.zeros([size + 1 for size in plain.shape]),
        plain.flatten(),
        plain.to_sparse(),
        plain.to("meta"),
        plain.bool(),
        plain.to(torch.complex64),
        plain.to(torch.float8_e4m3fn),
        plain * torch.inf,
        torch.empty(0),
        torch.empty((2**20,) * 3, device="meta"),
    ]
    made = rng.choice(odd)
    if made is not None:
        tensors[name if rng.random() < 0.9 else name.replace("1", "77")] = made
    return tensors


def run(rng: Random, folder: Path) -> Call:
    """What a run says about itself."""
    record = {"config": settings_of("llama"), "backbone": "llama", "weights": ["adapter.json"], "counts": {"read": 3}}
    (folder / "run.json").write_bytes(mutate.json_content(rng, record))
    return lambda: read_run(folder)


def shown_text(rng: Random, folder: Path) -> Call:
    """Whatever is shown: no control character reaches a terminal, no HTML the summary, and JSON stays JSON."""
    pieces = ("", " ", "é", "a=b", "\x00", "\x1b]0;", "\x9b", "\x07", "\r", "<img>", "|", "\\")
    text = "".join(rng.choice(pieces) for _ in range(6))
    row = Row(experiment=text, metric="f1", method=text, vary={text: text}, dataset=text, problem=text)
    benchmark = Benchmark(description=text, experiments=())

    def call() -> None:
        markdown = as_markdown(benchmark, [row], {})
        document = to_json({text: [text]})
        assert json.loads(document) == {text: [text]}
        for made in (str(printable(text)), markdown, as_csv([row]), document):
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", made.replace("\n", "")), made
        assert "<img>" not in markdown

    return call


TARGETS: dict[str, Target] = {
    "settings": settings,
    "options": options,
    "toml": toml,
    "records": records,
    "image": image,
    "class-folders": class_folders,
    "class-list": class_list,
    "sentences": sentences,
    "questions": questions,
    "captions": captions,
    "problems": problems,
    "talks": talks,
    "adapter": adapter,
    "foreign": foreign,
    "run": run,
    "shown-text": shown_text,
}


def clear(folder: Path) -> None:
    """Empties the folder for the next input."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
