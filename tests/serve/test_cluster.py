"""What hands requests to replicas, and a replica, with a stand-in for Ray; a real cluster of it is `test_ray.py`'s."""

import asyncio
import importlib
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="serving needs uvicorn")


class Router:
    """Ray's, of whose replicas all are available."""

    def select_available_replicas(self, candidates: list[Any]) -> list[Any]:
        return candidates


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`elastic_serve.cluster`, imported beside a stand-in."""
    names = ("ray", "ray.exceptions", "ray.serve", "ray.serve.config", "ray.serve.request_router")
    modules = {name: ModuleType(name) for name in names}
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
    given: dict[str, dict[str, Any]] = {
        "ray": {"exceptions": modules["ray.exceptions"], "serve": modules["ray.serve"]},
        "ray.serve": {"get_replica_context": lambda: context},
        "ray.serve.config": dict.fromkeys(("AutoscalingConfig", "HTTPOptions", "RequestRouterConfig"), dict),
        "ray.serve.request_router": dict.fromkeys(("PendingRequest", "ReplicaID", "RunningReplica"), object)
        | {"FIFOMixin": type("FIFOMixin", (), {}), "RequestRouter": Router},
    }
    for name, module in modules.items():
        vars(module).update(given.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "elastic_serve.cluster", raising=False)
    yield importlib.import_module("elastic_serve.cluster")
    sys.modules.pop("elastic_serve.cluster", None)


def test_a_replica_that_has_told_nothing_yet_is_not_sent_everything(cluster: Any) -> None:
    row = {"wait": 0.5, "alone": 0.5}
    old = [SimpleNamespace(replica_id=name, routing_stats={"number": 1, "models": {"m": dict(row)}}) for name in "ab"]
    replicas = [*old, SimpleNamespace(replica_id="new", routing_stats={})]
    router = cluster.Soonest()
    router.initialize_state()
    asked = SimpleNamespace(routing_context=SimpleNamespace(should_backoff=False), kwargs={"model": "m"})
    sent: Counter[str] = Counter()
    for _ in range(30):
        ((first,), *_) = asyncio.run(router.choose_replicas(replicas, asked))
        router.on_request_routed(asked, first.replica_id, None)
        sent[first.replica_id] += 1
    assert max(sent.values()) - min(sent.values()) <= 1


@pytest.mark.parametrize("secret", [None, "secret"])
def test_a_replica_that_others_reach_without_a_key_says_so(
    cluster: Any, digits: Path, secret: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from elastic_serve.server import Settings

    monkeypatch.setattr(cluster, "log", lambda: logging.getLogger("elastic_serve").addHandler(caplog.handler))
    replica = cluster.Replica([str(digits)], Settings(host="0.0.0.0", backend="ort"), secret)
    try:
        assert ("without an API key" in caplog.text) == (secret is None)
    finally:
        logging.getLogger("elastic_serve").removeHandler(caplog.handler)
        replica.__del__()
