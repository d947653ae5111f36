"""Prometheus metrics of a server, at ``/metrics``."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipeline.server.engine import Engine, Ticket

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        """Declare the metrics; gauges ask the engine when they are read."""
        self.registry = registry = CollectorRegistry()
        self._responses = Counter("mma_responses", "Responses by status.", ["status"], registry=registry)
        self._prompt = Counter("mma_prompt_tokens", "Tokens of prompts, image tokens included.", registry=registry)
        self._generated = Counter("mma_generated_tokens", "Generated tokens.", registry=registry)
        self._ended = Counter("mma_answers", "Answers by how they ended.", ["reason"], registry=registry)
        self._wait = self._histogram("mma_queue_seconds", "From arrival to the start of the prefill.")
        self._first = self._histogram("mma_first_token_seconds", "From arrival to the first token.")
        self._whole = self._histogram("mma_answer_seconds", "From arrival to the end of the answer.")
        for name, text, read in (
            ("mma_requests_running", "Requests in the batch.", lambda: engine.running),
            ("mma_requests_waiting", "Accepted requests outside the batch.", lambda: engine.waiting),
            ("mma_cache_tokens", "Allocated cache, in tokens, padding included.", lambda: engine.cached_tokens),
        ):
            Gauge(name, text, registry=registry).set_function(read)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self.registry)

    def responded(self, status: int) -> None:
        """Count a response."""
        self._responses.labels(str(status)).inc()

    def answered(self, ticket: Ticket, prompt_tokens: int, reason: str) -> None:
        """Count an answer that has ended: stop, length, cancelled or failed."""
        self._prompt.inc(prompt_tokens)
        self._generated.inc(ticket.generated)
        self._ended.labels(reason).inc()
        self._whole.observe(time.monotonic() - ticket.arrived)
        if ticket.started is not None:
            self._wait.observe(ticket.started - ticket.arrived)
        if ticket.first_token is not None:
            self._first.observe(ticket.first_token - ticket.arrived)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return bytes(generate_latest(self.registry))
