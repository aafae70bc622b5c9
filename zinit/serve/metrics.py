"""What Prometheus asks for."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from zinit.serve.requests import Event, Failed, Service, Ticket

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts and times of one server.

    Args:
        service: whose gauges are shown.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, service: Service) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter("zinit_requests", "Requests taken, by how they ended.", ["model", "end"], registry=own)
        self.prompt = Counter("zinit_prompt_tokens", "Tokens of prompts.", ["model"], registry=own)
        self.generated = Counter("zinit_generated_tokens", "Tokens of answers.", ["model"], registry=own)
        self.first = Histogram("zinit_first_text_seconds", "To the first text.", buckets=BUCKETS, registry=own)
        self.whole = Histogram("zinit_request_seconds", "To the end of all answers.", buckets=BUCKETS, registry=own)
        for name in ("waiting", "running", "models"):
            gauge = Gauge(f"zinit_{name}", f"{name} now.", registry=own)
            gauge.set_function(lambda name=name: service.gauges()[name])

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)

    async def watch(
        self, model: str, ticket: Ticket, events: AsyncIterator[Event], started: float
    ) -> AsyncIterator[Event]:
        """The same events, counted.

        Args:
            model: that was asked.
            ticket: of the request.
            events: of the request.
            started: when it came, by `time.perf_counter`.
        """
        self.prompt.labels(model).inc(ticket.prompt_tokens)
        first, end, left = True, "left", ticket.choices
        try:
            async for event in events:
                if first:
                    self.first.observe(time.perf_counter() - started)
                    first = False
                if isinstance(event, Failed):
                    end = "failed"
                else:
                    self.generated.labels(model).inc(len(event.tokens))
                    left -= event.reason is not None
                    end = end if left else "answered"
                yield event
        finally:
            ticket.cancel()
            self.whole.observe(time.perf_counter() - started)
            self.requests.labels(model, end).inc()
