"""Answers to a file of questions: in batches, in the order of the file, and gone on with where it was stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from zinit.adapter.file import DESCRIPTION, AdapterFile
from zinit.config import AdapterConfig, to_json
from zinit.data.conversations import Conversation, read_questions
from zinit.data.images import MAX_PIXELS, content_digest, read_image
from zinit.errors import ConfigError, DataError
from zinit.files import claim, is_file, local_path, parsing, write_atomically
from zinit.runs.directory import TRAINED, SavedRun
from zinit.runs.images import open_retrieval
from zinit.serve.engine import Engine
from zinit.serve.requests import BASE, Event, Failed, Limits, Refused, Sampling
from zinit.serve.served import Models
from zinit.train.checkpoint import MANIFEST
from zinit.ui.chat import ChatSession
from zinit.ui.console import QUIET_SECONDS, print_json, say
from zinit.ui.options import SEEDS

ANSWERS, SETTINGS = "answers.jsonl", "settings.json"
NO_LIMIT = 10**9
INTERNAL = 500  # statuses from here on are faults of the engine, and not of a record
Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What decides the answers, the questions aside.

    Args:
        run_dir: of a finished run.
        temperature: 0 is greedy.
        top_p: nucleus sampling.
        max_new_tokens: longest answer.
        seed: of the sampling; the answer to record i depends on ``seed + i``.
        base: switch the adapter off.
        system: what the assistant is told where a record does not say.
        index: folder of an index that what the adapter sees is mixed with; None mixes nothing.
        retrieval: how, see `zinit.runs.images.open_retrieval`.
    """

    run_dir: str
    temperature: float = 0.1
    top_p: float = 0.75
    max_new_tokens: int = 256
    seed: int = 0
    base: bool = False
    system: str = ""
    index: str | None = None
    retrieval: tuple[str, ...] | None = None

    def seed_of(self, number: int) -> int:
        """The seed of the answer to a record, of those that there are."""
        return (self.seed + number) % SEEDS


def answer_file(
    asking: Asking, data: str, output: str, *, batch: int = 32, progress: Callable[[int, int], None] = lambda *_: None
) -> dict[str, int]:
    """Answers every record of a file; the answers appear as a whole, when all are there.

    Until then they are in a folder beside ``output``, from which the same call goes on.

    Args:
        asking: how.
        data: see `read_questions`.
        output: a new file; a JSON object on each line.
        batch: answers that are generated at once.
        progress: called with the answers so far and all there will be.

    Returns:
        Counts: "read", "answered", "refused" (their lines say why) and what `read_questions` counts.

    Raises:
        ConfigError: if the output exists, or was begun with other settings or data.
        DataError: if a record asks nothing, or what was begun is damaged.
    """
    path, run = local_path(output), SavedRun.read(asking.run_dir)
    if path.exists():
        raise ConfigError(f"{output} exists already. Name another --output, or remove it.")
    counts: Counter[str] = Counter()
    talks = [
        talk if talk.system else replace(talk, system=asking.system) for talk in read_questions(data, counts=counts)
    ]
    if asking.index is not None and not any(talk.images for talk in talks):
        raise ConfigError(
            f"the index {asking.index} mixes what an adapter sees, and no record of {data} shows it anything. Leave "
            f"the index out."
        )
    folder = path.with_name(f"{path.name}.part")
    kept = {"run": _identity(run), "data": _digest(talks)}
    if asking.index is not None:  # by its content, as a run and images are
        open_retrieval(asking.index, asking.retrieval or ())
        kept["index"] = content_digest(Path(asking.index)).hex()
    with claim(folder, tell=lambda text: None):
        done = _begun(folder, {**asdict(asking), **kept})
        if len(done) < len(talks):
            with (
                (folder / ANSWERS).open("ab") as file,
                closing(_answers(asking, talks, done=len(done), batch=batch, run=run)) as lines,
            ):
                for line in lines:
                    file.write(to_json(line).encode() + b"\n")
                    file.flush()
                    done.append(line)
                    progress(len(done), len(talks))
        os.replace(folder / ANSWERS, path)
        (folder / SETTINGS).unlink()
    with suppress(OSError):
        folder.rmdir()
    refused = sum("error" in line for line in done)
    return {**counts, "answered": len(done) - refused, "refused": refused}


def run_file(run_dir: str, data: str, output: str, *, batch: int, quiet: bool, **how: Any) -> None:
    """`answer_file` for the command line: progress on the standard error stream, counts at the end."""
    last = time.monotonic()

    def progress(done: int, of: int) -> None:
        nonlocal last
        if not quiet and (done == of or time.monotonic() - last > QUIET_SECONDS):
            last = time.monotonic()
            say(f"{done} of {of} answered", error=True)

    try:
        counts = answer_file(Asking(run_dir=run_dir, **how), data, output, batch=batch, progress=progress)
    except KeyboardInterrupt:
        say("stopped; the answers so far are kept, and the same command goes on.", error=True)
        raise
    if quiet:
        print_json({"output": output, **counts})
        return
    say(f"wrote {output}: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count))


def _identity(run: SavedRun) -> str:
    files = [run.folder / DESCRIPTION, run.folder / TRAINED] if run.checkpoint is None else [run.checkpoint / MANIFEST]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


def _digest(talks: Sequence[Conversation]) -> str:
    """Tells these questions from all others, images by their content."""
    found = hashlib.sha256()
    for talk in talks:
        texts = [talk.system, *(text for each in talk.rounds for text in (each.question, each.input, each.answer))]
        found.update(repr((texts, [content_digest(image) for image in talk.images])).encode())
    return found.hexdigest()


def _begun(folder: Path, settings: dict[str, Any]) -> list[Line]:
    """The answers that there are; a torn line is cut off."""
    settings = json.loads(to_json(settings))
    if not (folder / SETTINGS).exists():
        write_atomically(folder / SETTINGS, to_json(settings).encode())
        (folder / ANSWERS).write_bytes(b"")
        return []
    advice = "Remove the folder, or name another --output."
    with parsing(f"{folder / SETTINGS} is damaged", DataError, advice):
        before = dict(json.loads((folder / SETTINGS).read_bytes()))
    if other := [name for name, value in settings.items() if before.get(name) != value and name != "run_dir"]:
        raise ConfigError(
            f"{folder} was begun with another {', '.join(other)}. Give the same, remove the folder, or name another "
            f"--output."
        )
    content = (folder / ANSWERS).read_bytes() if (folder / ANSWERS).exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomically(folder / ANSWERS, whole)
    with parsing(f"{folder / ANSWERS} is damaged", DataError, advice):
        return [dict(json.loads(line)) for line in whole.splitlines()]


def _answers(
    asking: Asking, talks: Sequence[Conversation], *, done: int, batch: int, run: SavedRun
) -> Generator[Line, None, None]:
    """A line for each record from a number on, in order."""
    if asking.index is not None or not _is_batched(run):
        yield from _one_by_one(asking, talks, done=done)
        return
    models = Models(asking.run_dir)
    if not asking.base:
        models.add("run", asking.run_dir)
    most: dict[str, Any] = {"queue": NO_LIMIT, "new_tokens": NO_LIMIT, "seconds": float(NO_LIMIT), "images": NO_LIMIT}
    limits = Limits(batch=batch, pixels=MAX_PIXELS, **most)  # the user's own files: as training reads them
    blind = _why_blind(run) if asking.base else ""
    engine = Engine(models, limits).start()
    try:
        name = BASE if asking.base else "run"
        waiting: list[_Asked] = []
        for number, talk in enumerate(itertools.islice(talks, done, None), start=done):
            waiting.append(_Asked(engine, name, number, talk, asking, blind))
            while len(waiting) >= 4 * batch:
                yield waiting.pop(0).line()
        for asked in waiting:
            yield asked.line()
    finally:
        engine.stop()


def _is_batched(run: SavedRun) -> bool:
    """Whether the engine can ask it: it batches prefixes, and reads images."""
    if not is_file(run.folder / DESCRIPTION) or run.checkpoint is not None:
        return False
    encoder = AdapterFile.read(run.folder).encoder or {}
    return encoder.get("modality", "image") == "image"


def _why_blind(run: SavedRun) -> str:
    """Why the adapter of a batched run takes no images here; empty if it does."""
    if getattr(run.config.options, "experts", ()):
        return "the run was made with what experts say about images, and they are not asked here."
    if AdapterConfig.of(AdapterFile.read(run.folder).config).context is None:
        return "the run is language-only: its adapter takes no images."
    return ""


def _unseen(talk: Conversation, blind: str) -> Conversation:
    """For the base, which images do not reach; those that the adapter would be refused are refused here too.

    Raises:
        Refused: with the reason.
    """
    if talk.images and blind:
        raise Refused(blind)
    try:
        for image in talk.images:
            read_image(image)
    except DataError as error:
        raise Refused(str(error)) from error
    return replace(talk, images=())


def _one_by_one(asking: Asking, talks: Sequence[Conversation], *, done: int) -> Generator[Line, None, None]:
    """As `_answers`, for every method."""
    how = {"temperature": asking.temperature, "top_p": asking.top_p, "max_new_tokens": asking.max_new_tokens}
    mixed = {"index": asking.index, "retrieval": asking.retrieval or ()}
    session = ChatSession(asking.run_dir, base=asking.base, **mixed, **how)
    for number, talk in enumerate(itertools.islice(talks, done, None), start=done):
        line: Line = {"index": number, "question": talk.rounds[-1].asked}
        try:
            answer, tokens = session.reply(talk, seed=asking.seed_of(number))
        except (ConfigError, DataError) as error:
            yield {**line, "error": str(error)}
            continue
        reason = "length" if tokens >= asking.max_new_tokens else "stop"
        yield {**line, "answer": answer, "finish_reason": reason, "tokens": tokens}


class _Asked:
    """One record that is being answered.

    Args:
        engine: answers.
        model: its name there.
        number: of the record.
        talk: what it asks.
        asking: how.
        blind: why the run takes no images, see `_why_blind`; looked at for the base alone.
    """

    def __init__(self, engine: Engine, model: str, number: int, talk: Conversation, asking: Asking, blind: str) -> None:
        self.number, self.question, self.over = number, talk.rounds[-1].asked, threading.Event()
        self.found: Line = {}
        self.fault = ""
        how = Sampling(
            max_tokens=asking.max_new_tokens,
            temperature=asking.temperature,
            top_p=asking.top_p,
            seed=asking.seed_of(number),
        )
        try:
            engine.ask(model, _unseen(talk, blind) if asking.base else talk, how, self._take)
        except Refused as error:
            if error.status >= INTERNAL:
                raise RuntimeError(str(error)) from error
            self._end({"error": str(error)})

    def _take(self, event: Event) -> None:
        if isinstance(event, Failed):
            self.fault = event.message if event.status >= INTERNAL else ""
            self._end({"error": event.message})
        elif event.reason is not None:
            self._end({"answer": event.answer, "finish_reason": event.reason, "tokens": len(event.tokens)})

    def _end(self, found: Line) -> None:
        self.found = found
        self.over.set()

    def line(self) -> Line:
        """What came of it.

        Raises:
            RuntimeError: if the engine has a fault: this is no answer, and another time there may be one.
        """
        self.over.wait()
        if self.fault:
            raise RuntimeError(f"record {self.number + 1} got no answer: {self.fault}")
        return {"index": self.number, "question": self.question, **self.found}
