"""Ready features in files: trained on, evaluated, asked about, and mixed with an index of keys."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import zinit as library
from tests.cli.conftest import Zinit
from tests.encoders.test_retrieval import oracle
from zinit.adapter.encoding import encode, load_feature_encoder
from zinit.adapter.handle import Handle
from zinit.encoders.retrieval import FeatureIndex, RetrievalConfig
from zinit.errors import ConfigError, DataError
from zinit.runs.evaluate import evaluate_run
from zinit.runs.images import open_retrieval
from zinit.runs.settings import resolve
from zinit.runs.train import train_run
from zinit.serve.served import Models
from zinit.ui.answers import Asking, answer_file
from zinit.ui.chat import ChatSession

WIDTH = 6
OPTIONS = ["steps=2", "warmup_steps=0", "batch_size=4", "learning_rate=0.3", "task.held_out=2", "task.template=vicuna",
           "context.hidden=8", "tuning.lora_rank=2", "prefix.gate_init=3.0", "prefix.init_std=0.01",
           "task.max_new_tokens=4"]  # fmt: skip
GREEDY = ("--max-new-tokens", 4, "--temperature", 0, "--json")


def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(20, WIDTH)).astype(np.float32)


def records(folder: Path) -> Path:
    """Twenty-two records: numbers of three sizes, several vectors in a file, a file that is gone, one of words."""
    for number, vector in enumerate(vectors()):
        np.save(folder / f"{number}.npy", vector.astype([np.float16, np.float32, np.float64][number % 3]))
    np.save(folder / "4.npy", vectors()[:3])
    save_file({"any": vectors()[5]}, folder / "5.safetensors")
    np.save(folder / "words.npy", np.array(["a", "b"]))
    files = [f"{number}.npy" for number in range(20)]
    files[5] = "5.safetensors"
    made: list[dict[str, Any]] = [
        {"vector": file, "instruction": "<vector>What is it?", "output": f"Thing {number}."}
        for number, file in enumerate([*files, "gone.npy", "words.npy"])
    ]
    (folder / "talks.json").write_text(json.dumps(made))
    return folder / "talks.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vectors")


def configured(folder: Path, model: Path, encoder: str) -> Any:
    given: dict[str, Any] = {"model": str(model), "data": str(folder / "talks.json"), "encoder": encoder}
    options = [*OPTIONS, f"encoder.cache={folder / 'cache'}"]
    return resolve(backbone="llama", task="conversation", method="imagebind-llm", options=options, **given)[0]


@pytest.fixture(scope="module")
def trained(folder: Path, model: Path) -> dict[str, Any]:
    records(folder)
    return train_run(configured(folder, model, f"vectors:{WIDTH}"), folder / "run")


@pytest.fixture(scope="module")
def index(folder: Path, trained: dict[str, Any]) -> FeatureIndex:
    keys = np.random.default_rng(1).normal(size=(30, WIDTH))
    return FeatureIndex.build(folder / "index", [keys], count=30, width=WIDTH)


def test_trained_and_evaluated(trained: dict[str, Any], folder: Path) -> None:
    counts = trained["counts"]
    assert (counts["read"], counts["skipped_missing_vector"], counts["skipped_unreadable_vector"]) == (22, 1, 1)
    assert (
        (counts["train_with_image"], counts["held_out_with_image"]) == (counts["train"], counts["held_out"]) == (18, 2)
    )
    losses = [trained["metrics"][name]["loss"] for name in ("base", "adapted", "shuffled")]
    assert len(set(losses)) == 3, "one file is not another"
    assert evaluate_run(folder / "run")["metrics"] == trained["metrics"]


def test_other_widths_are_refused_before_training(
    zinit: Zinit, folder: Path, model: Path, trained: dict[str, Any], tmp_path: Path
) -> None:
    given = ("--task", "conversation", "--method", "imagebind-llm", "--data", folder / "talks.json", "--output")
    options = [part for option in (*OPTIONS, f"encoder.cache={folder / 'cache'}") for part in ("-o", option)]
    for encoder, message in (
        ("vectors:5", f"holds vectors (1, {WIDTH}), and the encoder vectors:5 takes (5,) or (number, 5)"),
        (f"vectors:2x{WIDTH}", f"the encoder vectors:2x{WIDTH} takes (2, {WIDTH})"),
        ("vectors:wide", "ready features are named by their width"),
    ):
        place = tmp_path / encoder
        done = zinit("train", "--backbone", "llama", "--model", model, "--encoder", encoder, *given, place, *options)
        assert (done.code, message in done.err, "Traceback" in done.err) == (2, True, False), done.err
        assert not list(place.glob("*.safetensors"))


def test_asked_about_one_by_one_and_by_the_file(
    zinit: Zinit, folder: Path, trained: dict[str, Any], tmp_path: Path
) -> None:
    run = folder / "run"
    answers = []
    for number in (0, 1):
        done = zinit("generate", run, "--prompt", "What is it?", "--vector", folder / f"{number}.npy", *GREEDY)
        assert done.code == 0, done.err
        answers.append(json.loads(done.out)["answer"])
    asked = [{"prompt": "<vector>What is it?", "vector": f"{number}.npy"} for number in (0, 1)]
    (folder / "asked.json").write_text(json.dumps(asked))
    done = zinit("generate", run, "--data", folder / "asked.json", "--output", tmp_path / "a.jsonl", *GREEDY)
    assert done.code == 0, done.err
    assert [json.loads(line)["answer"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == answers
    refused = zinit("generate", run, "--prompt", "?", "--vector", folder / "talks.json", *GREEDY)
    assert (refused.code, "expected a file of vectors, .npy or .safetensors" in refused.err) == (2, True), refused.err
    (folder / "gone.json").write_text(json.dumps([{"prompt": "<vector>?", "vector": "gone.npy"}]))
    refused = zinit("generate", run, "--data", folder / "gone.json", "--output", tmp_path / "b.jsonl", *GREEDY)
    assert (refused.code, "asks nothing that can be answered: missing vector" in refused.err) == (2, True), refused.err


def test_served_for_texts_alone(folder: Path, trained: dict[str, Any]) -> None:
    served = Models.of({"run": str(folder / "run")}).get("run")
    assert (served.blind, served.info.sees) == ("its encoder takes vector, which requests do not carry", False)


def mixed(index: FeatureIndex, vector: np.ndarray, **settings: Any) -> np.ndarray:
    """A vector as the index changes it, written out in `test_retrieval.py`."""
    unit = vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64))
    return oracle(np.asarray(index.keys), unit, *settings.values())


def test_evaluated_with_an_index(index: FeatureIndex, folder: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    """As on data whose vectors were mixed by hand; the base does not change."""
    settings = {"k": 4, "sharpness": 5.0, "weight": 0.75}
    asked = []
    for number in (1, 2, 7):
        vector = vectors()[number]
        np.save(tmp_path / f"{number}.npy", mixed(index, vector.astype(np.float64), **settings))
        asked.append({"vector": f"{number}.npy", "instruction": "<vector>What is it?", "output": f"Thing {number}."})
    for place in (tmp_path, folder):
        (place / "few.json").write_text(json.dumps(asked))
    plain = evaluate_run(folder / "run", data=str(folder / "few.json"))["metrics"]
    by_hand = evaluate_run(folder / "run", data=str(tmp_path / "few.json"))["metrics"]
    options = ("retrieval.neighbours=4", "sharpness=5", "retrieval.weight=0.75")
    asking = {"data": str(folder / "few.json"), "index": str(folder / "index"), "retrieval": options}
    mixture = evaluate_run(folder / "run", **asking)
    assert mixture["index"] == str(folder / "index")
    assert mixture["retrieval"] == {"neighbours": 4, "sharpness": 5.0, "weight": 0.75}
    found = mixture["metrics"]
    assert abs(found["adapted"]["loss"] - by_hand["adapted"]["loss"]) < 4e-6
    assert abs(found["adapted"]["loss"] - plain["adapted"]["loss"]) > 1e-4
    assert found["base"] == plain["base"]


def test_asked_with_an_index(
    zinit: Zinit, index: FeatureIndex, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter gets the mixture, for one question and for a file of them; without an index the vector."""
    seen: list[torch.Tensor] = []
    given = Handle.given

    def noting(handle: Handle, **shown: Any) -> Any:
        seen.append(shown["features"].pooled)
        return given(handle, **shown)

    monkeypatch.setattr(Handle, "given", noting)
    (folder / "one.json").write_text(json.dumps([{"prompt": "<vector>What is it?", "vector": "1.npy"}]))
    one = ("generate", folder / "run", "--prompt", "What is it?", "--vector", folder / "1.npy", *GREEDY)
    filed = ("generate", folder / "run", "--data", folder / "one.json", "--output", tmp_path / "a.jsonl", *GREEDY)
    how = (
        "--index",
        folder / "index",
        "-o",
        "retrieval.neighbours=4",
        "-o",
        "sharpness=5",
        "-o",
        "retrieval.weight=0.75",
    )
    for arguments in (one, (*one, *how), (*filed, *how)):
        done = zinit(*arguments)
        assert done.code == 0, done.err
    mixture = mixed(index, vectors()[1], k=4, sharpness=5.0, weight=0.75)
    for found, expected in zip(seen, (vectors()[1], mixture, mixture), strict=True):
        assert (found[0] - torch.from_numpy(expected)).abs().max() < 1e-6


def test_an_index_that_does_not_fit_is_refused(index: FeatureIndex, folder: Path, model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    FeatureIndex.build(tmp_path / "narrow", [np.ones((3, 5))], count=3, width=5)
    other = {"source": "other-model", "modality": "image", "bgr": False, "type": "clip", "parameters": 3, "weights": {}}
    FeatureIndex.build(tmp_path / "other", [vectors()], count=20, width=WIDTH, encoder=other)
    host = AutoModelForCausalLM.from_pretrained(model)
    shown = library.PrefixConfig(length=1, prompt="table+context")

    def attached(source: str, encoder: str, **options: Any) -> Handle:
        config = library.AdapterConfig(parts={"prefix": shown}, context=source, context_options=options)
        return library.attach(host, config, encoder=encoder, name=source.replace("-", "_"))

    blind = library.attach(host, library.PrefixConfig(length=2), name="blind")
    layers = attached("projected-image", f"vectors:2x{WIDTH}", layers=1)
    sees = attached("bind", f"vectors:{WIDTH}", hidden=4)
    mine, space = folder / "index", f"the adapter's encoder gives vectors of width {WIDTH}"
    for handle, place, options, message in (
        (None, mine, (), "mixes what an adapter sees, and this one sees nothing"),
        (blind, mine, (), "mixes what an adapter sees, and this one sees nothing"),
        (layers, mine, (), "mixes one vector of each sample, and the adapter's source takes layers"),
        (sees, tmp_path / "narrow", (), f"has keys of width 5, and {space}"),
        (sees, tmp_path / "other", (), "by another encoder than the adapter's: modality is vector, expected image"),
        (sees, tmp_path, (), "holds no index"),
        (sees, mine, ("weight=2",), "retrieval.weight must be from 0 to 1; got 2"),
        (sees, mine, ("retrieval.wait=2",), "Did you mean"),
    ):
        with pytest.raises((ConfigError, DataError)) as raised:
            open_retrieval(str(place), options).check(handle)
        assert message in str(raised.value)
    mixing = open_retrieval(str(mine), ("retrieval.neighbours=3",))
    mixing.check(sees)
    assert mixing.config == RetrievalConfig(neighbours=3)


def test_answers_are_gone_on_with_by_the_same_index_only(
    index: FeatureIndex, folder: Path, trained: dict[str, Any], tmp_path: Path
) -> None:
    """An index is known by its content, wherever it lies."""
    (folder / "resumed.json").write_text(json.dumps([{"prompt": "<vector>?", "vector": f"{n}.npy"} for n in (1, 2)]))
    asked = (str(folder / "resumed.json"), str(tmp_path / "a.jsonl"))
    place = tmp_path / "index"
    shutil.copytree(folder / "index", place)
    asking = Asking(run_dir=str(folder / "run"), temperature=0, max_new_tokens=2, index=str(place))

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_file(asking, *asked, progress=stop)
    shutil.rmtree(place)
    FeatureIndex.build(place, [-np.asarray(index.keys)], count=30, width=WIDTH)
    with pytest.raises(ConfigError, match="was begun with another index"):
        answer_file(asking, *asked)
    assert answer_file(replace(asking, index=str(folder / "index")), *asked)["answered"] == 2


@pytest.mark.parametrize(
    ("place", "options", "message"),
    [("nowhere", (), "holds no index"), ("index", ("weight=2",), "retrieval.weight must be"),
     ("index", ("wait=2",), "Did you mean")],
)  # fmt: skip
def test_a_wrong_index_is_refused_before_anything_is_loaded(
    place: str, options: tuple[str, ...], message: str, index: FeatureIndex, folder: Path,
    trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("zinit.runs.evaluate.read_data", "zinit.runs.evaluate.build_model", "zinit.ui.chat.load_saved"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("it was read or loaded"))
    given: dict[str, Any] = {"index": str(folder / place), "retrieval": options}
    for ask in (evaluate_run, ChatSession):
        with pytest.raises((ConfigError, DataError), match=message):
            ask(folder / "run", **given)


def test_an_index_without_a_use_is_refused(zinit: Zinit, index: FeatureIndex, folder: Path, tmp_path: Path) -> None:
    run, mine = folder / "run", folder / "index"
    (tmp_path / "words.json").write_text(json.dumps([{"instruction": "What?", "output": "This."}]))
    for arguments, message in (
        (("generate", run, "--prompt", "?", "-o", "retrieval.weight=0.5"), "name an index, --index FOLDER"),
        (("generate", run, "--prompt", "?", "--index", mine, "--frozen"), "the adapter is off (--frozen)"),
        (("generate", run, "--prompt", "?", "--index", mine), "nothing is: name a file, or leave it out"),
        (("eval", run, "--data", tmp_path / "words.json", "--index", mine), "no example shows it anything"),
        (
            ("generate", run, "--data", tmp_path / "words.json", "--output", tmp_path / "a.jsonl", "--index", mine),
            f"no record of {tmp_path / 'words.json'} shows it anything",
        ),
        (("eval", run, "--suite", "pope", "--data", tmp_path, "--index", mine), "suites are asked without"),
        (("chat", run, "--web", "--index", mine), "--index is for the terminal"),
    ):
        done = zinit(*arguments)
        assert (done.code, message in done.err, "Traceback" in done.err) == (2, True, False), (arguments, done.err)


def test_vectors_are_tokens_and_means(folder: Path) -> None:
    np.save(folder / "two.npy", vectors()[:2])
    made = encode(load_feature_encoder(f"vectors:2x{WIDTH}"), [folder / "two.npy", None], layers=1)
    assert made.tokens is not None
    assert made.pooled is not None
    assert made.present is not None
    assert torch.equal(made.tokens[0], torch.from_numpy(vectors()[:2]))
    assert (made.pooled[0] - torch.from_numpy(vectors()[:2].mean(0))).abs().max() < 1e-6
    assert torch.equal(made.layers[0], made.pooled)
    assert made.present.tolist() == [True, False]
    averaged = encode(load_feature_encoder(f"vectors:{WIDTH}"), [folder / "two.npy"]).tokens
    assert averaged is not None
    assert (averaged[0] - made.pooled[:1]).abs().max() < 1e-6
