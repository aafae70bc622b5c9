"""Runs on suites: asked with and without the adapter, scored, kept, and what they were trained on counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.suites import made
from tests.tasks import science_qa
from tests.tiny import records, save_records, save_tiny_llama
from zinit.data.images import read_image
from zinit.demo import vit_path
from zinit.errors import ConfigError, DataError
from zinit.interop import lm_eval
from zinit.runs.build import load_run
from zinit.runs.lm_eval import figures
from zinit.runs.settings import resolve
from zinit.runs.suites import evaluate_suite
from zinit.runs.train import train_run

QUICK = ["steps=2", "batch_size=4", "learning_rate=0.02", "warmup_steps=0", "evaluate_every=0", "save_every=0",
         "max_new_tokens=4", "task.evaluation_limit=1"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shown(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with images, whose gates are opened: two steps hardly do."""
    folder = tmp_path_factory.mktemp("shown")
    given: dict[str, Any] = {
        "model": str(model),
        "data": str(science_qa.save(folder / "data")),
        "encoder": str(vit_path()),
    }
    options = [*QUICK, f"encoder.cache={folder / 'cache'}"]
    train_run(
        resolve(backbone="llama", task="science-qa", method="v1-multimodal", options=options, **given)[0],
        folder / "run",
    )
    set_gates(folder / "run", 4.0)
    return folder / "run"


@pytest.fixture(scope="module")
def text(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    given = {"model": str(model), "data": str(save_records(folder / "data.json"))}
    train_run(resolve(backbone="llama", options=QUICK, **given)[0], folder / "run")  # pyright: ignore
    return folder / "run"


def set_gates(run: Path, value: float) -> None:
    handle = load_run(run, torch.device("cpu"))[3]
    for name, tensor in handle.state_dict().items():
        if "gate" in name:
            tensor.fill_(value)
    handle.save(run)


def tell_apart(run: Path, images: list[Path]) -> None:
    """Makes the tokens of images the opposite of each other, and large: the answers differ with them."""
    handle = load_run(run, torch.device("cpu"))[3]
    source: Any = handle.shared["context"]
    made: list[torch.Tensor] = []
    hook = source.register_forward_hook(lambda module, given, context: made.append(context.tokens))
    with torch.no_grad(), handle.given(image=[read_image(image) for image in images]):
        hook.remove()
        middle = made[0].mean(dim=(0, 1))
        factor = 10 / (made[0] - middle).std()
        source.up.bias.sub_(middle).mul_(factor)
        source.up.weight.mul_(factor)
    handle.save(run)


def test_images_are_asked_about_with_and_without_the_adapter(shown: Path, tmp_path: Path) -> None:
    problems, splits = science_qa.document()
    pid = next(pid for pid in splits["train"] if problems[pid]["image"])
    known = problems[pid]["question"]
    images = sorted((shown.parent / "data" / "images" / "train" / pid).glob("*.png"))
    folder = made.mme(tmp_path / "mme")
    (folder / "OCR" / "1.png").write_bytes(images[0].read_bytes())
    (folder / "OCR" / "1.txt").write_text(f"{known}\tYes\nAnother?\tNo\n")
    tell_apart(shown, [folder / "existence" / "images" / name for name in ("0.png", "1.png")])
    results = evaluate_suite(shown, "mme", data=str(folder), output=tmp_path / "out")
    assert results["metrics"].keys() == {"base", "adapted"}
    assert {"existence", "OCR", "accuracy"} == results["metrics"]["adapted"].keys()
    assert results["counts"]["questions"] == 8
    assert (results["counts"]["images_trained_on"], results["counts"]["trained_on"]) == (1, 1)
    kept = json.loads((shown / "metrics.json").read_text())
    assert kept["suites"]["mme"]["metrics"] == results["metrics"]
    assert kept["metrics"]["adapted"]["loss"]  # what was there stays
    answers = json.loads((tmp_path / "out" / "answers.json").read_text())["answers"]
    assert [each["expected"] for each in answers[:2]] == [["yes"], ["no"]]
    one, other = ({each[name] for each in answers} for name in ("base", "adapted"))
    assert one != other
    check_answer(shown, folder / "existence" / "images" / "1.png", answers[3])


def check_answer(run: Path, image: Path, found: dict[str, Any]) -> None:
    """Token by token, without padding, batches or caches; another image has another answer."""
    _, model, tokenizer, handle = load_run(run, torch.device("cpu"))
    start = [tokenizer.bos_token_id, *tokenizer(found["question"], add_special_tokens=False)["input_ids"]]

    def answer(scope: AbstractContextManager[None]) -> str:
        ids = list(start)
        with torch.no_grad(), scope:
            while len(ids) < len(start) + 30 and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return tokenizer.decode(ids[len(start) :], skip_special_tokens=True).strip()

    assert answer(handle.disabled()) == found["base"]
    assert answer(handle.given(image=[read_image(image)])) == found["adapted"]
    other = image.with_name("0.png")
    assert answer(handle.given(image=[read_image(other)])) != found["adapted"]


def test_a_submission_for_a_test_set_without_answers(shown: Path, tmp_path: Path) -> None:
    file = made.mmbench(tmp_path / "test.tsv", answers=False)
    evaluate_suite(shown, "mmbench", data=str(file), output=tmp_path / "out")
    answers = json.loads((tmp_path / "out" / "answers.json").read_text())["answers"]
    rows = (tmp_path / "out" / "submission.tsv").read_text().splitlines()
    assert len(answers) == 6 <= len(rows) - 1
    with pytest.raises(ConfigError, match=r"has no answers"):
        evaluate_suite(shown, "mmbench", data=str(file))


@pytest.mark.parametrize(
    ("suite", "given", "message"),
    [
        ("mne", {"data": "x"}, "no suite named 'mne'. Did you mean 'mme'"),
        ("mme", {}, "the suite 'mme' is evaluated on data of yours: --data DIR"),
        ("mme", {"data": "x", "limit": 3}, "Leave out --limit"),
        ("mme:OCR", {"data": "x"}, "the suite 'mme' has no parts"),
        ("lm-eval:", {}, "name tasks of lm-eval"),
        ("lm-eval:a.yaml", {"data": "x"}, "name their data themselves"),
        ("lm-eval:gone.yaml", {}, "there is no task file gone.yaml"),
    ],
)
def test_wrong_options(suite: str, given: dict[str, Any], message: str, text: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        evaluate_suite(text, suite, **given)


def test_a_run_without_images_is_not_asked_about_them(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'mme' shows images, and the run in .* takes none"):
        evaluate_suite(text, "mme", data=str(made.mme(tmp_path)))


# --- lm-eval ----------------------------------------------------------------------------------------------------------

TASK = """
task: {name}
dataset_path: {path}
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module", autouse=True)
def _no_facts_about_the_machine() -> Iterator[None]:
    """lm-eval collects them for a report, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def arc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task in the form of ARC: eight questions, of which three are instructions of the training data."""
    folder = tmp_path_factory.mktemp("arc")
    asked = [record["instruction"] for record in records(3)] + [f"What is {n} of something long?" for n in range(5)]
    rows = [
        {"id": n, "question": question, "choices": [f"word {n}", "red", "a longer answer", "."], "answer": n % 4}
        for n, question in enumerate(asked)
    ]
    (folder / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "arc.yaml").write_text(TASK.format(name="local_arc", path="json", file=folder / "test.jsonl"))
    (folder / "hub.yaml").write_text(TASK.format(name="hub_arc", path="nobody/arc", file="test.jsonl"))
    return folder


@pytest.fixture(scope="module")
def measured(text: Path, arc: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    set_gates(text, 4.0)
    output = tmp_path_factory.mktemp("out")
    return evaluate_suite(text, f"lm-eval:{arc / 'arc.yaml'}", output=output), output


def test_log_likelihoods_of_lm_eval_are_the_models(measured: tuple[dict[str, Any], Path], text: Path) -> None:
    """Each answer's tokens behind its question's, one forward pass each: to the last example."""
    results, output = measured
    samples = json.loads((output / "samples.json").read_text())
    _, model, tokenizer, handle = load_run(text, torch.device("cpu"))
    right = {}
    for name in ("base", "adapted"):
        found = []
        assert len(samples[name]["local_arc"]) == 8
        for sample in samples[name]["local_arc"]:
            own = []
            for choice in sample["doc"]["choices"]:
                ids, answer = (
                    tokenizer(part, add_special_tokens=False)["input_ids"]
                    for part in (f"Question: {sample['doc']['question']}\nAnswer:", f" {choice}")
                )
                with torch.no_grad(), handle.disabled() if name == "base" else nullcontext():
                    logits = model(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
                own.append(float(logits.gather(1, torch.tensor(answer)[:, None]).sum()))
            assert own == pytest.approx([float(each[0][0]) for each in sample["resps"]], abs=1e-4)
            found.append(own.index(max(own)) == sample["doc"]["answer"])
        right[name] = sum(found) / len(found)
        assert results["metrics"][name]["local_arc/acc"] == right[name]
    assert samples["base"] != samples["adapted"]


def test_examples_that_were_trained_on_are_counted(measured: tuple[dict[str, Any], Path], text: Path) -> None:
    results, _ = measured
    assert results["counts"]["local_arc_examples"] == 8
    assert 1 <= results["counts"]["local_arc_trained_on"] <= 3  # some of these records may be held out
    kept = json.loads((text / "metrics.json").read_text())["suites"]["lm-eval:local_arc"]
    assert kept == {"metrics": results["metrics"], "counts": results["counts"]}


def test_closed_gates_have_the_frozen_models_score(text: Path, arc: Path, model: Path) -> None:
    set_gates(text, 0.0)
    task = str(arc / "arc.yaml")
    results = evaluate_suite(text, f"lm-eval:{task}", limit=6)
    lm = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(model), tokenizer=AutoTokenizer.from_pretrained(model))
    frozen = simple_evaluate(
        model=lm, tasks=[task], task_manager=TaskManager(include_defaults=False), limit=6, bootstrap_iters=0
    )
    assert frozen is not None
    assert results["metrics"]["base"] == results["metrics"]["adapted"] == figures(frozen["results"])
    assert results["counts"]["local_arc_examples"] == 6


def test_a_task_that_needs_the_network_says_so(text: Path, arc: Path) -> None:
    with pytest.raises(ConfigError, match=r"hub.yaml of lm-eval cannot be read: .*come from the Hub.*PATH.yaml"):
        evaluate_suite(text, f"lm-eval:{arc / 'hub.yaml'}")


def test_lm_eval_asks_a_run_in_its_tokenizers_chat_template(text: Path, arc: Path) -> None:
    lm = lm_eval.ZinitLM(run=str(text))
    lm.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    how = {"tasks": [str(arc / "arc.yaml")], "task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0}
    plain, chat = (simple_evaluate(model=lm, limit=2, apply_chat_template=asked, **how) for asked in (False, True))
    assert plain is not None
    assert chat is not None
    for bare, told in zip(plain["samples"]["local_arc"], chat["samples"]["local_arc"], strict=True):
        asked = bare["arguments"][0][0]
        assert told["arguments"][0][0].strip() == f"<user>{asked.strip()}<answer>"
        assert told["resps"] != bare["resps"]


def test_a_run_is_a_model_of_lm_eval(
    text: Path,
    arc: Path,
    measured: tuple[dict[str, Any], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_gates(text, 4.0)
    task, manager = str(arc / "arc.yaml"), TaskManager(include_defaults=False)
    samples = json.loads((measured[1] / "samples.json").read_text())
    for frozen, name in (("", "adapted"), (",frozen=True", "base")):
        args = f"run={text}{frozen}"
        found = simple_evaluate(model="zinit", model_args=args, tasks=[task], task_manager=manager, bootstrap_iters=0)
        assert found is not None
        for own, expected in zip(found["samples"]["local_arc"], samples[name]["local_arc"], strict=True):
            scores = [[float(each[0][0]) for each in sample["resps"]] for sample in (own, expected)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: lm_eval.ZinitLM(run="gone"))
    with pytest.raises(SystemExit) as end:
        lm_eval.main()
    assert end.value.code == 2
    assert "gone holds no run" in capsys.readouterr().err
