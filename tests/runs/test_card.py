"""Model cards and what goes to the Hub, with a stand-in for the Hub's client."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

import zinit
from tests.serve.world import folders
from zinit.errors import CheckpointError
from zinit.runs.card import EVAL_RESULTS, _model_index, leaderboard_entry, model_card, push
from zinit.runs.record import RECORD, RESULTS, Record, Results
from zinit.tasks import TASKS


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the Hub; the client's calls that zinit makes end there."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repository: str, *, private: bool | None, exist_ok: bool) -> Any:
            if repository.count("/") != 1:
                raise ValueError("Repo id must be in the form 'user/name'")
            (root / repository).mkdir(parents=True, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=repository)

        def file_exists(self, repository: str, name: str) -> bool:
            return (root / repository / name).exists()

        def create_commit(self, repository: str, operations: Any, *, commit_message: str) -> Any:
            for operation in operations:
                (root / repository / operation.path_in_repo).parent.mkdir(exist_ok=True)
                with operation.as_file() as file:
                    (root / repository / operation.path_in_repo).write_bytes(file.read())
            return SimpleNamespace(commit_url=f"https://hub/{repository}/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **_: str(root / repository))
    return root


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with figures."""
    folder = Path(shutil.copytree(folders()["anna"], tmp_path / "secret" / "run"))
    record = json.loads((folder / RECORD).read_text())
    more = {"method": "zero-init", "counts": {"read": 12, "train": 11, "held_out": 1}}
    record["config"]["data"] = "/secret/data.json"
    record["config"]["train"]["activation_cache"] = "/secret/cache"
    (folder / RECORD).write_text(json.dumps(record | more))
    metrics = {"base": {"loss": 4.0}, "adapted": {"loss": 1.25, "rouge_l": 0.5}}
    (folder / RESULTS).write_text(json.dumps({"metrics": metrics, "seed": 3}))
    return folder


def test_a_card_says_what_the_run_is_and_shows_no_path(run: Path) -> None:
    card: Any = ModelCard(model_card(run))
    assert card.data.library_name == "zinit"
    assert card.data.license == "other"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results or ()}
    assert found == {"loss": 1.25, "rouge_l": 0.5}
    assert {result.dataset_name for result in card.data.eval_results or ()} == {"data.json"}
    for line in ("| examples | 12 read, 11 train, 1 held_out |", "| held-out (seed 3) | base | adapted |",
                 "| rouge_l | - | 0.5000 |"):  # fmt: skip
        assert line in card.text
    assert "secret" not in str(card)
    assert str(run.parent) not in str(card)


@pytest.mark.parametrize("task", list(TASKS))
def test_figures_are_of_the_task_as_the_hub_calls_it(task: str) -> None:
    (found,) = _model_index(Record(task=task), Results(metrics={"adapted": {"loss": 1.0}}), "data.json")
    known = {"vtab": "image-classification", "ner": "token-classification", "squad": "question-answering",
             "caption": "image-to-text", "base-to-novel": "zero-shot-image-classification"}  # fmt: skip
    assert found.task_type == known.get(task, "text-generation")


def test_what_is_pushed_is_loaded_with_its_base(run: Path, hub: Path) -> None:
    (run / "README.md").write_text("with a licence: THIS_REPOSITORY")
    assert push(str(run), "me/mine") == "https://hub/me/mine/commit/1"
    there = hub / "me" / "mine"
    assert sorted(path.name for path in there.iterdir()) == ["README.md", "adapter.json", "adapter.safetensors"]
    assert (there / "README.md").read_text() == "with a licence: me/mine", "the run's own card goes along"
    with pytest.raises(CheckpointError, match="does not say which model it was made for: pass model="):
        zinit.from_pretrained("me/mine")  # it was a folder of this machine
    handle = zinit.from_pretrained("me/mine", model=folders()["model"])
    expected = zinit.load(type(handle.model).from_pretrained(folders()["model"]).eval(), run)  # pyright: ignore
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(handle.model(ids).logits, expected.model(ids).logits)
        with handle.disabled():
            assert not torch.equal(handle.model(ids).logits, expected.model(ids).logits)
    (there / "README.md").write_text("mine")
    assert handle.push_to_hub("me/mine").startswith("https://")
    assert (there / "README.md").read_text() == "mine", "a card that is there stays"
    handle.push_to_hub("me/other")
    card = (hub / "me" / "other" / "README.md").read_text()
    assert "library_name: zinit" in card
    assert 'zinit.from_pretrained("me/other")' in card


def test_a_figure_on_a_data_set_of_the_hub_goes_to_its_page(run: Path, hub: Path) -> None:
    def say(**options: Any) -> None:
        record = json.loads((run / RECORD).read_text())
        record["config"]["task"] = {"name": "squad", **options}
        (run / RECORD).write_text(json.dumps(record | {"task": "squad"}))

    metrics = {"base": {"f1": 1.0}, "adapted": {"loss": 1.25, "f1": 81.5}}
    (run / RESULTS).write_text(json.dumps({"metrics": metrics, "seed": 3, "counts": {"questions": 808, "refused": 0}}))
    say(held_out_data="rajpurkar/squad_v2:plain:validation")
    push(str(run), "me/mine")
    [found] = parse_eval_result_entries(yaml.safe_load((hub / "me" / "mine" / EVAL_RESULTS).read_text()))
    assert (found.dataset_id, found.task_id, found.value) == ("rajpurkar/squad_v2", "plain", 81.5)
    assert found.notes is not None
    assert found.notes.startswith("f1; split validation; 808 questions; seed ")
    for own in (None, "dev.json", "/secret/dev.json", str(run)):
        say(held_out_data=own)
        assert leaderboard_entry(run) is None


def test_no_folder_of_this_machine_is_named_on_the_hub(hub: Path) -> None:
    handle = zinit.from_pretrained(folders()["eyes"])
    handle.push_to_hub("me/eyes")
    for file in (hub / "me" / "eyes").iterdir():
        assert str(folders()["model"].parent).encode() not in file.read_bytes(), file.name
    handle.model.config._name_or_path = "some/model"  # pyright: ignore
    handle.push_to_hub("me/named")
    named = json.loads((hub / "me" / "named" / "adapter.json").read_text())
    assert named["model"]["name_or_path"] == "some/model"
    assert "base_model: some/model" in (hub / "me" / "named" / "README.md").read_text()


def test_a_card_that_is_no_text_is_one_message(run: Path, hub: Path) -> None:
    (run / "README.md").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"README\.md is not UTF-8 text: .* Save it as UTF-8, or remove it"):
        push(str(run), "me/mine")
    assert not hub.exists()


def test_what_the_hub_refuses_is_one_message(run: Path, hub: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the Hub did not take mine: .*USER/NAME"):
        push(str(run), "mine")
    (run / "adapter.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="is damaged"):
        push(str(run), "me/mine")
    assert not hub.exists()
