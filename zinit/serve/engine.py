"""The engine: one base, many adapters, one thread that generates for all of them; requests come and go between tokens.

Rows whose adapters a route takes share a batch, the base among them. Where a route refuses (`Served.routable`), or an
image is given, the rows of each adapter are a batch of their own.
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from PIL.Image import Image

from zinit.data.conversations import Conversation, Round
from zinit.data.images import Encoded, ImageSource, check_image, read_image
from zinit.errors import ConfigError, DataError
from zinit.models.decoding import Chooser
from zinit.models.generation import conversational, sampled
from zinit.serve.answer import AnswerText
from zinit.serve.groups import FAULT, Group, Row
from zinit.serve.requests import Deliver, Failed, Limits, ModelInfo, Refused, Sampling, Ticket, Turn
from zinit.serve.served import Models, Served

log = logging.getLogger("zinit.serve")
IDLE = 60.0  # seconds without a request after which no adapter's keys and values are kept
STOPPING = Failed(message="the server is going down.", status=503)


class Engine:
    """Generates answers in a thread of its own; see `zinit.serve.requests.Service` for what may be asked.

    Args:
        models: the base and its adapters.
        limits: what is taken on.
    """

    def __init__(self, models: Models, limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
        self.limits, self._models = limits, models
        self._waiting: deque[Row] = deque()
        self._calls: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._groups: dict[str, Group] = {}
        self._kept, self._keeps = ExitStack(), False  # see `_keep`
        self._wake = threading.Condition()
        self._stopping = False
        self._tokenizing = threading.Lock()  # a tokenizer is not made for several threads
        self._thread = threading.Thread(target=self._run, name="zinit-engine", daemon=True)

    def start(self) -> Engine:
        """Starts the thread."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends all answers and the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    # --- what may be asked, from any thread ---

    def models(self) -> list[ModelInfo]:
        """See `Service.models`."""
        return [served.info for served in list(self._models.by_name.values())]

    def gauges(self) -> dict[str, int]:
        """See `Service.gauges`."""
        running = sum(len(group.rows) for group in list(self._groups.values()))
        return {"waiting": len(self._waiting), "running": running, "models": len(self._models.by_name)}

    def chat(self, model: str, turns: Sequence[Turn], sampling: Sampling, deliver: Deliver) -> Ticket:
        """See `Service.chat`."""
        talk = _conversation(turns)
        images = [
            Encoded(f"image {number}", lambda data=data: data)
            for number, data in enumerate((image for turn in turns for image in turn.images), start=1)
        ]
        return self.ask(model, replace(talk, images=tuple(images)), sampling, deliver)

    def ask(self, model: str, talk: Conversation, sampling: Sampling, deliver: Deliver) -> Ticket:
        """Asks for answers to the last question of a conversation; see `Service.chat`."""
        served = self._models.get(model)
        self._check_room()  # nothing is looked at for nothing
        self._check_images(served, talk.images)
        with self._tokenizing, _told():
            prompt = served.format.prompt(talk)
        return self._submit(served, [prompt], sampling, deliver, images=talk.images)

    def complete(self, model: str, prompts: Sequence[str], sampling: Sampling, deliver: Deliver) -> Ticket:
        """See `Service.complete`."""
        served = self._models.get(model)
        self._check_room()
        for prompt in prompts:
            _check_text(prompt)
        with self._tokenizing:
            encoded = [served.task.encode_prompt(self._models.tokenizer, prompt) for prompt in prompts]
        return self._submit(served, encoded, sampling, deliver, strip=False)

    def load(self, name: str, source: str) -> None:
        """See `Service.load`."""
        prepared = self._models.prepare(name, source)  # in the thread of the request: the others are answered meanwhile
        self._call(lambda: self._models.attach(prepared))

    def unload(self, name: str) -> None:
        """See `Service.unload`. Answers of the adapter that are not at their end fail."""

        def remove() -> None:
            served = self._models.removable(name)
            self._fail(lambda row: row.served is served, _taken_away(served))
            self._models.remove(name)

        self._call(remove)

    # --- taking a request ---

    def _check_images(self, served: Served, given: Sequence[ImageSource]) -> None:
        """What can be said of images before they are decoded, which is when the adapter sees them: they take memory."""
        if given and served.blind:
            raise Refused(f"the model {served.name!r} takes no images: {served.blind}.", parameter="messages")
        if len(given) > self.limits.images:
            raise Refused(f"{len(given)} images are more than the {self.limits.images} allowed.", parameter="messages")
        try:
            for image in given:
                if not isinstance(image, Image):
                    check_image(image, max_pixels=self.limits.pixels)
        except DataError as error:
            raise Refused(str(error), parameter="messages") from error

    def _submit(
        self,
        served: Served,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        deliver: Deliver,
        *,
        images: Sequence[ImageSource] = (),
        strip: bool = True,
    ) -> Ticket:
        count = len(prompts) * sampling.n
        if count > self.limits.choices:
            raise Refused(f"{count} answers are more than the {self.limits.choices} allowed.", parameter="n")
        ticket = Ticket(prompt_tokens=sum(map(len, prompts)), choices=count)
        seed = random.getrandbits(48) if sampling.seed is None else sampling.seed
        deadline = time.monotonic() + self.limits.seconds
        stops = [*served.format.stop_strings, *sampling.stop]
        rows: list[Row] = []
        for number, prompt in enumerate(prompts):
            config = self._generation(served, prompt, sampling)
            for index in range(number * sampling.n, (number + 1) * sampling.n):
                rows.append(
                    Row(
                        ticket=ticket,
                        deliver=_guarded(deliver, ticket),
                        served=served,
                        index=index,
                        prompt=prompt,
                        chooser=Chooser(self._models.base, config, prompt, (seed + index) % 2**63),
                        text=AnswerText(self._models.tokenizer, [*(config.stop_strings or ()), *stops], strip=strip),
                        ends=frozenset([*config.eos_token_id, *served.format.stop_tokens]),
                        max_tokens=config.max_new_tokens,
                        logprobs=sampling.logprobs,
                        deadline=deadline,
                        images=images,
                    )
                )
        self._enqueue(rows)
        return ticket

    def _generation(self, served: Served, prompt: Sequence[int], sampling: Sampling) -> Any:
        """As `zinit generate` has it: the model's own settings under what the request says."""
        if not prompt:
            raise Refused("the prompt is empty; say something.")
        room, longest = self._models.room, self.limits.prompt_tokens
        most = min(x for x in (None if room is None else room - 1, longest, 10**9) if x is not None)
        if len(prompt) > most:
            raise Refused(
                f"the prompt has {len(prompt)} tokens; there is room for {most}.", code="context_length_exceeded"
            )
        length = sampling.max_tokens if room is None else min(sampling.max_tokens, room - len(prompt))
        said = sampled(max_new_tokens=length, temperature=sampling.temperature, top_p=sampling.top_p)
        config, _, _ = conversational(self._models.base, eos_token_id=self._models.tokenizer.eos_token_id, **said)
        return config

    def _enqueue(self, rows: list[Row]) -> None:
        with self._wake:
            if self._stopping:
                raise Refused(STOPPING.message, status=STOPPING.status)
            self._check_room(len(rows))
            self._waiting.extend(rows)
            self._wake.notify()

    def _check_room(self, count: int = 1) -> None:
        with self._wake:
            self._waiting = deque(row for row in self._waiting if not row.gone)
            waiting = len(self._waiting)
        if waiting + count > self.limits.queue:
            raise Refused(f"{waiting} answers are waiting already. Try again later.", status=429, code="queue_full")

    def _call(self, function: Callable[[], None]) -> None:
        """Runs something between two tokens, while no scope is open, and waits for it."""
        future: Future[None] = Future()
        with self._wake:
            if self._stopping:
                raise Refused(STOPPING.message, status=STOPPING.status)
            self._calls.append((function, future))
            self._wake.notify()
        future.result()

    # --- the thread ---

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._stopping or self._waiting or self._calls or self._groups):
                    if not self._wake.wait(IDLE if self._keeps else None):
                        self._forget()
                if self._stopping:
                    break
            self._do_calls()
            self._admit()
            for key, group in list(self._groups.items()):
                self._try(group.rows, group.step)
                if not group.rows:
                    group.close()
                    del self._groups[key]
        self._fail(lambda row: True, STOPPING)
        for group in self._groups.values():
            group.close()
        self._groups.clear()
        self._forget()
        for _, future in self._calls:
            future.set_exception(Refused(STOPPING.message, status=STOPPING.status))

    def _do_calls(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            for group in self._groups.values():
                group.close()
            self._forget()
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    def _admit(self) -> None:
        """Takes in as many waiting answers as there is room for, and reads their prompts."""
        free = self.limits.batch - sum(len(group.rows) for group in self._groups.values())
        fresh: dict[str, list[Row]] = {}
        longest = count = 0
        self._drop_waiting()
        while free > 0:
            with self._wake:
                if not self._waiting:
                    break
                row = self._waiting[0]
                widest = max(longest, len(row.prompt))
                if count and widest * (count + 1) > self.limits.prefill_tokens:
                    break
                self._waiting.popleft()
            if self._models.by_name.get(row.served.name) is not row.served:  # since the request looked it up
                row.fail(_taken_away(row.served))
            if row.gone:
                continue
            longest, count, free = widest, count + 1, free - 1
            fresh.setdefault(row.group, []).append(row)
        for key, rows in fresh.items():
            self._try(rows, lambda key=key, rows=rows: self._take_in(key, rows))

    def _drop_waiting(self) -> None:
        """Those whom nobody waits for any more leave, and those that have waited for too long fail."""
        now = time.monotonic()
        with self._wake:
            late = [row for row in self._waiting if now > row.deadline]
            self._waiting = deque(row for row in self._waiting if now <= row.deadline and not row.gone)
        for row in late:
            row.fail(Failed(message="the request waited for longer than a request may take.", status=429))

    def _take_in(self, key: str, rows: list[Row]) -> None:
        self._see(rows)
        rows = [row for row in rows if not row.gone]
        if not rows:
            return
        self._keep(rows)
        if key not in self._groups:
            self._groups[key] = Group(self._models.base, key)
        self._groups[key].add(rows)

    def _see(self, rows: list[Row]) -> None:
        """Decodes the images of rows for their adapter, and lets go of them."""
        seen: dict[int, Any] = {}  # by ticket: answers to one request see the same
        for row in rows:
            if not row.images or row.gone:
                continue
            if id(row.ticket) not in seen:
                try:
                    images = [read_image(image, max_pixels=self.limits.pixels) for image in row.images]
                except DataError as error:
                    row.fail(Failed(message=str(error), status=400))
                    continue
                seen[id(row.ticket)] = row.served.see(images)
            row.context, row.images = seen[id(row.ticket)], ()

    def _keep(self, rows: list[Row]) -> None:
        """Opens a scope in which each adapter's keys and values are computed once, whatever batches it is in."""
        handle = next((row.served.handle for row in rows if row.served.handle is not None), None)
        if handle is not None and not self._keeps:
            self._kept.enter_context(handle.disabled())  # nothing is on but what a batch says
            self._kept.enter_context(handle.cached_kv())
            self._keeps = True

    def _forget(self) -> None:
        self._kept.close()
        self._keeps = False

    def _try(self, rows: list[Row], action: Callable[[], None]) -> None:
        """An error ends the requests that it is of, and nothing else."""
        try:
            action()
        except Exception:
            log.exception("answers failed")
            failed = list(rows)
            self._fail(lambda row: row in failed, FAULT)
            for row in failed:
                row.fail(FAULT)

    def _fail(self, which: Callable[[Row], bool], event: Failed) -> None:
        with self._wake:
            waiting = [row for row in self._waiting if which(row)]
            self._waiting = deque(row for row in self._waiting if not which(row))
        for row in [*waiting, *(row for group in self._groups.values() for row in group.drop(which))]:
            row.fail(event)


def _taken_away(served: Served) -> Failed:
    return Failed(message=f"the model {served.name!r} was taken away.", status=404)


def _guarded(deliver: Deliver, ticket: Ticket) -> Deliver:
    """A receiver that is gone ends its request alone."""

    def guarded(event: Any) -> None:
        try:
            deliver(event)
        except Exception:
            ticket.cancel()

    return guarded


class _told:
    """What is wrong with a conversation is the request's fault."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ConfigError | DataError):
            raise Refused(str(error), parameter="messages") from error


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused("the text is not valid Unicode.") from error


def _conversation(turns: Sequence[Turn]) -> Conversation:
    """Rounds of a chat: system texts, then user and assistant in turn, the user last."""
    for turn in turns:
        _check_text(turn.text)
    told = list(itertools.takewhile(lambda turn: turn.role == "system", turns))
    said = turns[len(told) :]
    roles = [turn.role for turn in said]
    if "system" in roles:
        raise Refused("system messages must come first.", parameter="messages")
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        got = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "") or "none"
        raise Refused(
            f"expected messages of user and assistant in turn, the user's first and last; got {got}.",
            parameter="messages",
        )
    pairs = zip(said[::2], said[1::2], strict=False)
    rounds = [Round(question=asked.text, answer=answered.text) for asked, answered in pairs]
    system = "\n\n".join(turn.text for turn in told if turn.text.strip())
    return Conversation(rounds=(*rounds, Round(question=said[-1].text)), system=system)
