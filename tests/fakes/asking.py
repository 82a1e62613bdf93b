"""An engine over bundles that need no backend, and what it tells."""

import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fake_flux import SCHNELL, Opener, manifest, to_zero
from fakes import write_manifest
from msgspec.structs import replace

from elastic_runtime import Bundle, ElasticPipeline, Request
from elastic_runtime.contract.manifest import Cost
from elastic_serve.engine import Drawn, Engine, Event, Failed, Order, Stepped
from elastic_serve.metrics import Metrics
from elastic_serve.served import Served

COST = tuple(
    Cost(budget={"tokens": count}, flops=count**2 + 100 * count, weight_bytes=1000, activation_bytes=10 * count) for count in (1, 512, 1024)
)


def served(folder: Path, name: str = "plans", field: Callable[[Any], np.ndarray] = to_zero) -> Served:
    """A model of five classes that is drawn along plans, over sessions that need no backend."""
    opener = Opener(replace(manifest(SCHNELL, classes=5), cost=COST), field)
    folder.mkdir(exist_ok=True)
    write_manifest(folder, opener.bundle.manifest)
    opener.bundle = Bundle.open(folder)
    return Served(name, ElasticPipeline(opener.bundle, opener))


class Asking:
    """An engine over some bundles, and what it tells."""

    def __init__(self, *models: Served, **words: Any):
        self.engine = Engine(models, Metrics(), **words)
        self.events: queue.Queue[tuple[int, Event]] = queue.Queue()

    def __enter__(self) -> "Asking":
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def ask(self, *requests: tuple[Served, Request], **words: Any) -> tuple[int, ...]:
        def tell(place: int) -> Callable[[Event], None]:
            return lambda event: self.events.put((place, event))

        orders = [Order(model, request, tell(place), self.engine.now(), **words) for place, (model, request) in enumerate(requests)]
        return self.engine.submit(orders)

    def ends(self, count: int) -> dict[int, Drawn | Failed]:
        """How `count` pictures ended, by their places."""
        ended: dict[int, Drawn | Failed] = {}
        while len(ended) < count:
            place, event = self.events.get(timeout=30)
            if not isinstance(event, Stepped):
                ended[place] = event
        return ended
