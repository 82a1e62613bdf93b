"""What the server counts, in Prometheus' form."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from elastic_runtime.contract.budget import Budget, key

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server; every name begins with `elastic_`, but for the process's own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # on Linux: resident memory, CPU seconds, open files

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"elastic_{name}", words, labels, registry=self._registry)

        self.requests = counter("requests", "Requests by status.", "model", "status")
        self.pictures = counter("pictures", "Pictures by how they ended: drawn, cancelled, failed.", "model", "outcome")
        self.refused = counter("refused", "Pictures refused before they were begun: deadline, never, full, closing.", "model", "reason")
        self.misses = counter("deadline_misses", "Pictures done after a deadline that was promised.", "model")
        self.kept = counter("deadlines_kept", "Pictures done within a deadline that was promised.", "model")
        self.steps = counter("steps", "Steps of pictures by budget.", "model", "budget")
        self.runs = counter("runs", "Runs of the denoiser.", "model")
        self.latency = Histogram(
            "elastic_picture_seconds", "From the request to the picture.", ("model",), buckets=SECONDS, registry=self._registry
        )
        self.rows = Histogram("elastic_run_rows", "Rows of the largest run of a step.", ("model",), buckets=ROWS, registry=self._registry)
        self.reading = Histogram(
            "elastic_prompt_seconds", "Reading a prompt, beside the steps.", ("model",), buckets=SECONDS, registry=self._registry
        )
        self.waiting = Gauge("elastic_pictures_waiting", "Pictures that no step was taken of.", registry=self._registry)
        self.drawing = Gauge("elastic_pictures_drawing", "Pictures in flight.", registry=self._registry)
        self.level = Gauge("elastic_level", "Level of the budgets, 0 the cheapest to 1 the best.", registry=self._registry)
        self.pace = Gauge("elastic_pace", "Seconds of late steps over what was measured at the start.", ("model",), registry=self._registry)

    def stepped(self, model: str, budgets: list[Budget], runs: int, rows: int, pace: float) -> None:
        """One step of pictures at these budgets, in so many runs."""
        for budget in budgets:
            self.steps.labels(model, key(budget) or "whole").inc()
        self.runs.labels(model).inc(runs)
        self.rows.labels(model).observe(rows)
        self.pace.labels(model).set(pace)

    def drawn(self, model: str, seconds: float, kept: bool | None) -> None:
        """A picture is done; `kept` tells whether in time, where that was promised."""
        self.pictures.labels(model, "drawn").inc()
        self.latency.labels(model).observe(seconds)
        if kept is not None:
            (self.kept if kept else self.misses).labels(model).inc()

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)
