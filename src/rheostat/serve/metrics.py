"""Prometheus metrics. Names end as vLLM's do, with our own prefix: dashboards are easily carried over."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rheostat.serve.engine import Engine
from rheostat.serve.jobs import Bill

PREFIX = "rheostat"

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
WHOLE = (0.1, 0.3, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300)
TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SHARES = tuple(round(0.05 * k, 2) for k in range(1, 21))
BEYOND = (-0.1, -0.05, -0.02, -0.01, -0.005, 0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)


class Metrics:
    """What an engine tells, as `Watcher`."""

    def __init__(self, name: str) -> None:
        self.registry = CollectorRegistry()
        self.name = name
        self._finished = self._counter("request_success", "Requests that ended, by reason", "finished_reason")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens read")
        self._new = self._counter("generation_tokens", "Tokens written")
        self._flops = self._counter("flops", "FLOPs spent")
        self._dense = self._counter("dense_flops", "FLOPs that the dense model would have spent")
        self._widths = self._counter("ffn_tokens", "Tokens through a routed layer, by the width they took", "width")
        self._drafts = self._counter("spec_decode_num_draft_tokens", "Tokens drafted")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Drafted tokens that stood")
        self._lowered = self._counter("lowered_requests", "Requests that a busy server answered below their dial")
        self._http = self._counter("http_refusals", "Requests that were refused, by status", "status")
        self._first = self._histogram("time_to_first_token_seconds", FIRST)
        self._between = self._histogram("inter_token_latency_seconds", BETWEEN)
        self._whole = self._histogram("e2e_request_latency_seconds", WHOLE)
        self._queue = self._histogram("request_queue_time_seconds", FIRST)
        self._prefill = self._histogram("request_prefill_time_seconds", FIRST)
        self._decode = self._histogram("request_decode_time_seconds", WHOLE)
        self._prompts = self._histogram("request_prompt_tokens", TOKENS)
        self._answers = self._histogram("request_generation_tokens", TOKENS)
        self._compute = self._histogram("compute_fraction", SHARES)
        self._beyond = self._histogram("compute_beyond_target", BEYOND)

    def watch(self, engine: Engine) -> None:
        """Gauges that are read from the engine when somebody asks."""
        for name, key, text in (
            ("num_requests_running", "running", "Requests in the batch"),
            ("num_rows_running", "rows", "Sequences in the batch"),
            ("num_requests_waiting", "waiting", "Requests in the queue"),
            ("kv_cache_usage_perc", "cache_share", "Share of the token budget in use (1 is all)"),
            ("adaptive_level", "level", "How far the load-adaptive dial is down (0 to 1)"),
        ):
            gauge = Gauge(f"{PREFIX}_{name}", text, ["model_name"], registry=self.registry)
            gauge.labels(self.name).set_function(lambda key=key: engine.state()[key])  # type: ignore[misc]
        held = Gauge(f"{PREFIX}_kv_cache_bytes", "Bytes held for the cache", ["model_name"], registry=self.registry)
        held.labels(self.name).set_function(lambda: engine.backend.cache_bytes)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)

    def refused(self, status: int) -> None:
        """A request was not taken."""
        self._http.labels(self.name, str(status)).inc()

    # -- the engine's Watcher

    def token(self, seconds: float | None) -> None:
        """A token was written, so long after the one before."""
        if seconds is not None:
            self._between.labels(self.name).observe(seconds)

    def finished(self, reason: str, bill: Bill) -> None:
        """A request has ended."""
        name = self.name
        self._finished.labels(name, reason).inc()
        for counter, value in (
            (self._prompt, bill.num_prompt_tokens if bill.prefill_seconds else 0),
            (self._new, bill.num_new_tokens),
            (self._flops, bill.flops),
            (self._dense, bill.dense_flops),
            (self._drafts, bill.num_draft_tokens),
            (self._accepted, bill.num_accepted_tokens),
            (self._lowered, int(bill.is_lowered)),
        ):
            counter.labels(name).inc(value)
        for width, count in bill.tokens_by_width.items():
            self._widths.labels(name, width).inc(count)
        if bill.num_new_tokens:
            for histogram, seconds in (
                (self._first, bill.first_token_seconds),
                (self._whole, bill.total_seconds),
                (self._queue, bill.queue_seconds),
                (self._prefill, bill.prefill_seconds),
                (self._decode, bill.decode_seconds),
                (self._prompts, bill.num_prompt_tokens),
                (self._answers, bill.num_new_tokens),
                (self._compute, bill.compute),
                (self._beyond, bill.compute - bill.target),
            ):
                histogram.labels(name).observe(seconds)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, ["model_name", *labels], registry=self.registry)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        text = name.replace("_", " ")
        return Histogram(f"{PREFIX}_{name}", text, ["model_name"], registry=self.registry, buckets=buckets)
