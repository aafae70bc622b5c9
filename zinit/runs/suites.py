"""Evaluates a run on a suite: the base beside the adapted model, and how much of it the run was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinit.data.conversations import Conversation, Round
from zinit.data.images import content_digest
from zinit.distributed import map_over_ranks
from zinit.errors import ConfigError
from zinit.models.offload import weights_in_place
from zinit.runs.asked import ADAPTED, BASE, OpenRun, keep, open_run
from zinit.runs.images import feature_cache
from zinit.runs.lm_eval import LM_EVAL, evaluate_texts
from zinit.suites import SUITES
from zinit.suites.base import Suite
from zinit.tasks import TASKS
from zinit.tasks.answers import answer_in_batches, continue_texts

if TYPE_CHECKING:
    from zinit.encoders.cache import FeatureCache


def evaluate_suite(
    directory: str | Path,
    suite: str,
    *,
    data: str | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """The base and the adapted model of a finished run on a suite. The run's ``metrics.json`` keeps the figures.

    Args:
        directory: of the run.
        suite: a name of ``SUITES``, or "lm-eval:" and names of its tasks or paths of its ``.yaml`` files, with commas.
        data: the suite's folder or file.
        limit: examples of each task, for lm-eval.
        fewshot: examples before each question, for lm-eval; None is the task's own number.
        output: a folder for the answers.

    Raises:
        ConfigError: if the options or the run do not go with the suite.
        DataError: if the data is not the suite's.
    """
    name, _, tasks = suite.partition(":")
    if name == LM_EVAL:
        if data is not None:
            raise ConfigError("tasks of lm-eval name their data themselves. Leave --data out.")
        return evaluate_texts(directory, tasks, limit=limit, fewshot=fewshot, output=output)
    given = {"--limit": limit, "--fewshot": fewshot}
    if extra := [option for option, value in given.items() if value is not None]:
        raise ConfigError(f"a part of the suite {name!r} has no known score. Leave out {', '.join(extra)}.")
    if tasks:
        raise ConfigError(f"the suite {name!r} has no parts; got {suite!r}.")
    if data is None:
        SUITES.where(name)
        raise ConfigError(f"the suite {name!r} is evaluated on data of yours: --data DIR")
    questions: Suite = SUITES.get(name)(data)
    questions.check_output(output)
    return _ask(open_run(directory), questions, output)


def _ask(run: OpenRun, suite: Suite, output: str | Path | None) -> dict[str, Any]:
    """Asks all questions of both models, and scores the answers."""
    handle = run.built.adapted.handle
    if handle is None or (cache := feature_cache(run.config, handle)) is None:
        raise ConfigError(
            f"the suite {suite.name!r} shows images, and the run in {run.folder} takes none. Train one that does: "
            f"--method v1-multimodal"
        )
    digests = [content_digest(question.image) for question in suite.questions]
    cache.encoder.to(run.accelerator.device)
    cache.fill(dict(zip(digests, (q.image for q in suite.questions), strict=True)))
    outputs = {}
    with run.built.adapted.disabled():
        outputs[BASE] = _answers(run, suite)
    run.adapt()
    outputs[ADAPTED] = _answers(run, suite, cache, digests)
    scores = {name: suite.score(own) for name, own in outputs.items()}
    metrics = {name: own.metrics for name, own in scores.items()}
    counts: dict[str, Any] = {**suite.counts}
    for name, own in scores.items():
        counts |= {f"{kind}_{name}" if kind == "unread" else kind: count for kind, count in own.counts.items()}
    if run.trained_on is not None:
        questions = zip(suite.questions, digests, strict=True)
        counts["trained_on"] = sum(run.trained_on.text(q.text, digest) for q, digest in questions)
        counts["images_trained_on"] = sum(map(run.trained_on.image, set(digests)))
    files = {}
    if (table := suite.table(outputs[ADAPTED])) is not None:
        files["submission.tsv"] = table
    answers = [
        {
            "id": q.id,
            "question": q.text,
            "expected": list(q.answers),
            **{name: own[place] for name, own in outputs.items()},
        }
        for place, q in enumerate(suite.questions)
    ]
    return keep(run, suite.name, metrics, counts, {"answers.json": {"answers": answers}, **files}, output)


def _answers(run: OpenRun, suite: Suite, cache: FeatureCache | None = None, digests: Sequence[bytes] = ()) -> list[str]:
    """What a model answers, greedily, in the template that the run was trained in; with images if there are any."""
    model, tokenizer, handle = run.built.adapted.model, run.built.processor, run.built.adapted.handle
    talk = TASKS.get(run.config.task).chat_format(tokenizer, run.config.options)
    rounds = [Round(question=question.prompt or question.text) for question in suite.questions]
    encoded = [talk.prompt(Conversation(rounds=(each,))) for each in rounds]
    stop_tokens, stop_strings = list(talk.stop_tokens), talk.stop_strings

    def some(mine: Sequence[int]) -> list[str]:
        def answer(places: list[int], count: int) -> list[str]:
            chosen = [mine[place] for place in places]
            shown = nullcontext()
            if cache is not None and handle is not None:
                shown = handle.given(features=cache.features([[digests[index]] for index in chosen]))
            with shown:
                prompts = [encoded[index] for index in chosen]
                return continue_texts(
                    model, tokenizer, prompts, count, stop_tokens=stop_tokens, stop_strings=stop_strings
                )

        return answer_in_batches(model, [encoded[index] for index in mine], suite.max_new_tokens, answer)

    with run.accelerator.autocast(), weights_in_place(model):
        return map_over_ranks(run.accelerator, len(encoded), some)
