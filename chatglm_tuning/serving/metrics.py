"""What Prometheus is told. Labels are only names that the server itself knows, or a stranger could make any number."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from chatglm_tuning.inference.engine import BatchEngine

_FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self, engine: BatchEngine) -> None:
        self._registry = CollectorRegistry()
        of_model = ["model"]
        self._requests = Counter(
            "chatglm_requests", "Answered requests.", ["route", "status", "model"], registry=self._registry
        )
        self._request_seconds = Histogram(
            "chatglm_request_seconds",
            "Time from a request to the end of its answer.",
            ["route"],
            buckets=_REQUEST_SECONDS,
            registry=self._registry,
        )
        self._first_token_seconds = Histogram(
            "chatglm_time_to_first_token_seconds",
            "Time from a request to its first token.",
            of_model,
            buckets=_FIRST_TOKEN_SECONDS,
            registry=self._registry,
        )
        self._prompt_tokens = Counter(
            "chatglm_prompt_tokens", "Tokens of prompts that were read.", of_model, registry=self._registry
        )
        self._completion_tokens = Counter(
            "chatglm_completion_tokens", "Tokens of answers.", of_model, registry=self._registry
        )
        running = Gauge("chatglm_running_answers", "Answers that are being written.", registry=self._registry)
        running.set_function(lambda: engine.running)
        waiting = Gauge("chatglm_waiting_answers", "Answers that wait for their turn.", registry=self._registry)
        waiting.set_function(lambda: engine.waiting)

    def count_request(self, route: str, status: int, model: str, seconds: float) -> None:
        """Count a request that was answered with `status` (499: its client had left). model: "" where it had none."""
        self._requests.labels(route, str(status), model).inc()
        self._request_seconds.labels(route).observe(seconds)

    def observe_first_token(self, model: str, seconds: float) -> None:
        """Note how long the first token of an answer took."""
        self._first_token_seconds.labels(model).observe(seconds)

    def count_tokens(self, model: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of an answer, whole or broken off."""
        self._prompt_tokens.labels(model).inc(prompt_tokens)
        self._completion_tokens.labels(model).inc(completion_tokens)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)
