"""Answers that are generated together: rows of one batch, and the scope that gives each its adapter."""

from __future__ import annotations

import contextvars
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zinit.adapter.state import state_of
from zinit.data.images import ImageSource
from zinit.models.decoding import Batch, Chooser, choose
from zinit.prefix import Context
from zinit.serve.answer import AnswerText
from zinit.serve.requests import Deliver, Failed, Piece, Reason, Ticket, TokenLogprob
from zinit.serve.served import Served

log = logging.getLogger("zinit.serve")
FAULT = Failed(message="the server has a fault; its log says more.")
ROUTE = ""  # names the group whose rows a route tells apart; others are named after their adapter


@dataclass(eq=False, kw_only=True)
class Row:
    """One answer.

    Attributes:
        ticket: of its request.
        deliver: takes what comes.
        served: whose it is.
        index: among the answers of the request.
        prompt: its tokens.
        chooser: chooses tokens.
        text: of the answer.
        ends: tokens that end it.
        max_tokens: longest.
        logprobs: see `zinit.serve.requests.Sampling`.
        deadline: by `time.monotonic`.
        images: that the adapter is to see; not decoded, and none once it has seen them.
        context: what it makes of them.
        pending: log probabilities that were not delivered yet.
    """

    ticket: Ticket
    deliver: Deliver
    served: Served
    index: int
    prompt: Sequence[int]
    chooser: Chooser
    text: AnswerText
    ends: frozenset[int]
    max_tokens: int
    logprobs: int | None
    deadline: float
    images: Sequence[ImageSource] = ()
    context: Context | None = None
    pending: list[TokenLogprob] = field(default_factory=list)

    @property
    def group(self) -> str:
        """Which answers it is generated with."""
        sees = self.images or self.context is not None
        return ROUTE if self.served.routable and not sees else self.served.name

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.ticket.cancelled

    def take(self, token: int, logits: Tensor) -> bool:
        """Adds a token and delivers what it shows; whether the answer is over."""
        if self.logprobs is not None:
            self.pending.append(self._logprob(token, logits))
        more = self.text.add(token)
        reason: Reason | None = None
        if token in self.ends or self.text.ended:
            reason = "stop"
        elif len(self.text.tokens) >= self.max_tokens or time.monotonic() > self.deadline:
            reason = "length"
        if reason is not None:
            self.end(reason, more)
        elif more:
            self.deliver(Piece(index=self.index, text=more, logprobs=self._taken()))
        return reason is not None

    def end(self, reason: Reason, more: str = "") -> None:
        """Delivers the last piece."""
        rest, whole = self.text.finish()
        tokens = tuple(self.text.tokens)
        self.deliver(
            Piece(
                index=self.index, text=more + rest, logprobs=self._taken(), reason=reason, tokens=tokens, answer=whole
            )
        )

    def fail(self, event: Failed) -> None:
        """Ends the whole request."""
        if not self.gone:
            self.ticket.cancel()
            self.deliver(event)

    def _taken(self) -> list[TokenLogprob]:
        taken, self.pending = self.pending, []
        return taken

    def _logprob(self, token: int, logits: Tensor) -> TokenLogprob:
        assert self.logprobs is not None
        scores = logits.log_softmax(-1)
        values, tokens = scores.topk(min(self.logprobs, len(scores)))
        decode = self.text.tokenizer.decode
        top = [(decode([other]), value) for other, value in zip(tokens.tolist(), values.tolist(), strict=True)]
        return TokenLogprob(token=decode([token]), logprob=float(scores[token]), top=top)


class Group:
    """Rows of one batch.

    The scope that gives each row its adapter lives in a context of its own, so that several groups may be open in one
    thread; it is made anew when rows have come or gone, inside the scopes of the thread itself.

    Args:
        model: the base.
        key: of the group, see `Row.group`.
    """

    def __init__(self, model: Any, key: str) -> None:
        self.model, self.key = model, key
        self.rows: list[Row] = []
        self.batch = Batch(model)
        self._thread = contextvars.copy_context()
        self._scope = ExitStack()
        self._of: tuple[Row, ...] = ()  # the rows that the open scope is of

    def add(self, rows: list[Row]) -> None:
        """Reads the prompts of new rows, chooses their first tokens, and takes them in."""
        new = Batch(self.model)
        with _scope_of(self.model, self.key, rows):
            logits = new.start([row.prompt for row in rows])
        stay = self._take(rows, logits)
        new.keep(stay)
        if stay:
            self.batch.join(new)
            self.rows += [rows[number] for number in stay]

    def step(self) -> None:
        """The next token of every row."""
        self.drop(lambda row: row.gone)
        if not self.rows:
            return
        self._open()
        logits = self._thread.run(self.batch.step, [row.text.tokens[-1] for row in self.rows])
        self._keep(self._take(self.rows, logits))

    def drop(self, leaves: Any) -> list[Row]:
        """Rows of which something is true leave; they are returned."""
        gone = [row for row in self.rows if leaves(row)]
        if gone:
            self._keep([number for number, row in enumerate(self.rows) if row not in gone])
        return gone

    def close(self) -> None:
        """Leaves the scope: adapters may come and go."""
        self._thread.run(self._scope.close)
        self._thread, self._of = contextvars.copy_context(), ()

    def _open(self) -> None:
        if self._of == tuple(self.rows):
            return
        self.close()
        self._thread.run(self._scope.enter_context, _scope_of(self.model, self.key, self.rows))
        self._of = tuple(self.rows)

    def _take(self, rows: Sequence[Row], logits: Tensor) -> list[int]:
        """Chooses a token for each row; the numbers of those that go on."""
        if (broken := ~logits.amax(-1).isfinite()).any():
            logits = logits.nan_to_num()  # those rows end here; the others know nothing of it
        tokens, errors = choose(logits, [row.chooser for row in rows], [row.text.tokens for row in rows])
        for number in broken.nonzero().flatten().tolist():
            rows[number].fail(Failed(message="the model computes no numbers for this prompt."))
        for number, error in errors.items():
            log.error("a token cannot be chosen", exc_info=error)
            rows[number].fail(FAULT)
        return [n for n, row in enumerate(rows) if not row.gone and not row.take(tokens[n], logits[n])]

    def _keep(self, numbers: list[int]) -> None:
        self.batch.keep(numbers)
        self.rows = [self.rows[number] for number in numbers]


@contextmanager
def _scope_of(model: Any, key: str, rows: Sequence[Row]) -> Iterator[None]:
    """Each row its own adapter, with keys and values of the prompts computed once."""
    handles = [row.served.handle for row in rows]
    first = next((handle for handle in handles if handle is not None), None)
    with ExitStack() as scopes:
        if key == ROUTE and first is not None:
            scopes.enter_context(first.route([None if handle is None else handle.name for handle in handles]))
        elif first is not None:
            scopes.enter_context(first.alone())
            if (context := _stacked([row.context for row in rows])) is not None:
                scopes.enter_context(first.context(context))
            scopes.enter_context(first.cached_kv())
        elif (state := state_of(model)) is not None:
            scopes.enter_context(next(iter(state.handles.values())).disabled())
        yield


def _stacked(contexts: Sequence[Context | None]) -> Context | None:
    """The contexts of several samples as one; None where no sample has one."""
    some = next((context for context in contexts if context is not None), None)
    if some is None:
        return None
    absent = Context(torch.zeros_like(some.tokens), torch.zeros(1, dtype=torch.bool, device=some.tokens.device))
    all_ = [absent if context is None else context for context in contexts]
    present = [torch.ones_like(c.tokens[:, 0, 0], dtype=torch.bool) if c.present is None else c.present for c in all_]
    return Context(torch.cat([context.tokens for context in all_]), torch.cat(present))
