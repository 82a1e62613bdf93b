"""The server on Ray Serve: replicas that each open the bundles and draw, and in front of them what hands requests on.

A request goes to the replica that is predicted to be done first. Each tells Ray what it foresees, a few times a second; what was sent since
then is added. As many replicas run as their queues are long for, between a least and a most.
"""

import asyncio
import contextlib
import os
import signal
import threading
import warnings
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.types import Message

from elastic_runtime.contract.axis import Span
from elastic_runtime.errors import MissingError, UsageError
from elastic_serve.address import bound
from elastic_serve.body import Limits
from elastic_serve.relay import Relay, answered, soonest
from elastic_serve.served import named, servable
from elastic_serve.server import Settings, application, exposed, key, log, opened

NAME = "elastic-export"
FORESEEN = 0.2  # seconds between what a replica tells of what it foresees
QUEUED = 4.0  # requests of a replica for which one more is started
SEVERAL = 8  # times its queue: what a replica may be sent at once, since it refuses what is too much itself, and says until when


@dataclass(frozen=True)
class Cluster:
    """How many replicas there are, by how much is asked for, and the GPUs that each takes (0.5: two share one)."""

    replicas: Span = Span(1, 4)  # noqa: RUF009  frozen
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.replicas.min < 1:
            raise UsageError(f"--replicas is a span from 1, such as 1-4, got {self.replicas}: one is needed to draw")
        if not self.gpus >= 0:
            raise UsageError(f"--gpus is 0 or more for each replica, got {self.gpus}")


class Soonest(FIFOMixin, RequestRouter):
    """To whom a request goes: the replica that is predicted to be done with it first."""

    def initialize_state(self, **_: Any) -> None:
        self._sent, self._numbers = Counter[ReplicaID](), dict[ReplicaID, int]()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        model = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            model = pending_request.kwargs.get("model")
        for each in candidate_replicas:
            number = each.routing_stats.get("number", 0)
            if self._numbers.get(each.replica_id) != number:  # what was sent before is in what it foresees
                self._numbers[each.replica_id] = number
                self._sent[each.replica_id] = 0
        free = self.select_available_replicas(candidate_replicas)
        loads = [(each.routing_stats, self._sent[each.replica_id]) for each in free]
        return [[free[place]] for place in soonest(loads, model)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._sent[replica_id] += 1


class Replica:
    """Opens the bundles, and draws."""

    def __init__(self, folders: Sequence[str], settings: Settings, secret: str | None):
        log()
        exposed(settings, secret)
        warnings.simplefilter("ignore", UserWarning)  # which quote a prompt that an encoder cuts
        self._stack, self._number = contextlib.ExitStack(), 0
        models = [self._stack.enter_context(opened(Path(folder), settings)) for folder in folders]
        self._app, self._engine = application(models, settings, secret)
        self._drain = settings.drain
        self._name = ray_serve.get_replica_context().replica_id.unique_id.encode()

    async def answer(self, scope: Mapping[str, Any], body: bytes, model: str | None = None) -> AsyncGenerator[Message, None]:
        """The messages of an answer; `model` is for the router."""
        async with contextlib.aclosing(answered(self._app.asgi, scope, body)) as messages:
            async for message in messages:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-elastic-replica", self._name)]
                yield message

    async def record_routing_stats(self) -> dict[str, Any]:
        """What the router is told."""
        self._number += 1
        return {"number": self._number, "models": await asyncio.to_thread(self._engine.forecast)}

    def check_health(self) -> None:
        if not self._engine.alive:
            raise RuntimeError("the engine has ended")

    def __del__(self) -> None:
        if engine := getattr(self, "_engine", None):
            engine.close(self._drain)
        self._stack.close()


class Front:
    """Hands requests on to the replicas."""

    def __init__(self, replicas: Any, limits: Limits):
        self._replicas = replicas
        self._relay = Relay(self._ask, (ray.exceptions.RayActorError,), limits)

    def __serve_build_asgi_app__(self) -> Relay:
        """The application, as Ray Serve asks for it where it runs."""
        return self._relay

    async def _ask(self, scope: dict[str, Any], body: bytes, model: str | None) -> AsyncGenerator[Message, None]:
        answer = self._replicas.options(stream=True).answer.remote(scope, body, model=model)
        try:
            async for message in answer:
                yield message
        finally:
            answer.cancel()


def build(folders: Sequence[str], settings: Settings, cluster: Cluster, secret: str | None) -> Any:
    """The application for Ray Serve."""
    replicas = ray_serve.deployment(Replica).options(
        name="replica",
        ray_actor_options={"num_cpus": 1, "num_gpus": cluster.gpus},
        max_ongoing_requests=SEVERAL * settings.queue,
        autoscaling_config=AutoscalingConfig(
            min_replicas=cluster.replicas.min, max_replicas=cluster.replicas.max, target_ongoing_requests=QUEUED
        ),
        request_router_config=RequestRouterConfig(request_router_class=Soonest, request_routing_stats_period_s=FORESEEN),
        graceful_shutdown_timeout_s=settings.drain,
        health_check_period_s=5,
    )
    front = ray_serve.deployment(ray_serve.ingress()(Front)).options(
        name="front", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=SEVERAL * settings.queue * cluster.replicas.max
    )
    return front.bind(replicas.bind(list(folders), settings, secret), settings.limits)


def from_config(arguments: Mapping[str, Any]) -> Any:
    """The application for a `RayService` or `serve deploy`: `import_path: elastic_serve.cluster:from_config` with `args`.

    `bundles` are folders that every node has; `replicas` is a span, `1-4`; `gpus` those of each; other names are `Settings`'. The key
    comes from the environment of the node that reads this.
    """
    known = dict(arguments)
    folders = known.pop("bundles", None)
    if not isinstance(folders, list) or not folders:
        raise UsageError(f"args name the bundles: a list of folders, got {folders!r}")
    cluster = Cluster(Span.parse(str(known.pop("replicas", "1-4"))), float(known.pop("gpus", 0.0)))
    known.setdefault("host", "0.0.0.0")
    try:
        settings = Settings(**known | {"limits": Limits(**known.get("limits", {}))})
    except TypeError as error:
        raise UsageError(f"args are bundles, replicas, gpus, and fields of Settings: {error}") from None
    named([Path(folder) for folder in folders])
    return build(folders, settings, cluster, key())


def _enough(cluster: Cluster, resources: Mapping[str, float]) -> None:
    """Raise UsageError where a machine is too small for the least number of replicas."""
    for kind, of_each in (("CPU", 1.0), ("GPU", cluster.gpus)):
        if of_each * cluster.replicas.min > resources.get(kind, 0.0):
            has = f"{resources.get(kind, 0.0):g} {kind}s"
            raise UsageError(f"{cluster.replicas.min} replicas take {of_each:g} {kind} each, and this machine has {has}: ask for fewer")


def serve(folders: Sequence[Path], settings: Settings, cluster: Cluster, ready: Callable[[str], None] | None = None) -> None:
    """Serve bundles on a Ray cluster, the one that RAY_ADDRESS names or one on this machine, until the process is told to end.

    Raises: UsageError as `elastic_serve.server.serve`, and for a port that is any, which a cluster has none of.
    """
    named(folders)
    secret = key()
    log()
    if not settings.port:
        raise UsageError("--port 0 is for one machine: with --ray name a port, which every node then has")
    for folder in folders:
        servable(folder)
    places = [str(folder.resolve() if folder.exists() else folder) for folder in folders]  # or names on the hub, for each node to fetch
    for each in bound(settings.host, settings.port):  # which Ray would find out after a long time, and not say
        each.close()
    ended = threading.Event()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of ours calls home
    alone = "RAY_ADDRESS" not in os.environ
    ray.init(**({"include_dashboard": False} if alone else {}))
    try:
        if alone:  # where nothing can be added, and Ray would wait for it
            _enough(cluster, ray.cluster_resources())
        for number in (signal.SIGTERM, signal.SIGINT):  # now: Ray puts a handler of its own, which aborts, in the place of an earlier one
            signal.signal(number, lambda *_: ended.set())
        try:
            ray_serve.start(http_options=HTTPOptions(host=settings.host, port=settings.port))
            ray_serve.run(build(places, settings, cluster, secret), name=NAME)
        except (RuntimeError, ray.exceptions.RayError) as error:  # which Ray has told of in many lines
            raise MissingError(f"Ray did not start the server: {str(error).strip().splitlines()[-1]}. Its lines above say why") from error
        if ready:
            ready(f"http://{settings.host}:{settings.port}")
        ended.wait()
    finally:
        ray_serve.shutdown()
        ray.shutdown()
