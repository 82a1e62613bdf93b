"""Which artifact a graph is opened from, and with which backend: the fastest of those that are exact enough."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from elastic_runtime.choosing.calibration import chosen, fastest
from elastic_runtime.choosing.precisions import allowed
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.device import probe
from elastic_runtime.errors import BundleError, MissingError, UsageError
from elastic_runtime.sessions.opening import candidates, obstacles, open_origin, open_session
from elastic_runtime.sessions.session import Origin, Session


class ArtifactOpener:
    """Opens a bundle's graphs with one backend, or the fastest where none is named; of some precisions, or the most exact.

    `options` are the backend's session's. See `ElasticPipeline.from_pretrained`, also for what is raised. Several threads may open graphs
    at once, and only one of them measures.
    """

    def __init__(self, bundle: Bundle, backend: str | None, precisions: Sequence[str] | str, floor: float, options: Mapping[str, Any]):
        graphs = bundle.manifest.graphs
        if "denoiser" not in graphs:
            raise BundleError(
                f"{bundle.folder} has no graph 'denoiser', it has {', '.join(graphs)}: export the model again with --components "
                "transformer,vae"
            )
        checks = [obstacles(artifact, backend) for artifact in graphs["denoiser"].artifacts]
        if not any(room for room, _ in checks):
            why = " ".join(dict.fromkeys(reason for _, reasons in checks for reason in reasons))
            raise MissingError(f"nothing here can run 'denoiser' of {bundle.folder}. {why}")
        precisions = allowed(bundle.manifest, (precisions,) if isinstance(precisions, str) else precisions, floor)
        able, reasons = candidates(bundle, "denoiser", backend) if precisions else ([], [])
        if precisions and not any(candidate.within(precisions) for candidate in able):
            has, asked = dict.fromkeys(artifact.precision for artifact in graphs["denoiser"].artifacts), ", ".join(precisions)
            if has.keys() & set(precisions):
                raise MissingError(f"nothing here can run 'denoiser' of {bundle.folder} in {asked}. {' '.join(reasons)}")
            raise UsageError(f"{bundle.folder} has its denoiser in {', '.join(has)}, and none in {asked}: export it so, too")
        self._bundle, self._backend, self._precisions, self._options = bundle, backend, precisions, options
        self.spent = 0.0  # seconds that choosing took, which are no part of a picture
        self._choosing = threading.Lock()

    @cached_property
    def _fastest(self) -> Origin | None:
        """Kept here, too, since the file of what was measured cannot be written everywhere."""
        if (self._backend or self._options) and not self._precisions:
            return None  # the backend's most exact
        begun = time.perf_counter()
        choice = fastest(self._bundle, "denoiser", probe, time.perf_counter, self._precisions, self._able("denoiser"))
        self.spent = time.perf_counter() - begun
        return choice

    def _able(self, graph: str) -> list[Origin]:
        """What a graph can be opened from, with the options that are asked for."""
        able = candidates(self._bundle, graph, self._backend)[0]
        return [
            replace(each, options={**each.options, **self._options})
            for each in able
            if not each.options or "precision" not in self._options  # which says it already
        ]

    def __call__(self, graph: str) -> Session:
        with self._choosing:  # whoever comes second finds what was measured
            choice = self._fastest
        if choice and graph == "denoiser":
            return open_origin(self._bundle, graph, choice)
        # What runs the denoiser runs the other graphs too, where it opens them.
        able = [each for each in self._able(graph) if choice is None or each.backend == choice.backend]
        if not able or not (choice or self._precisions):
            return open_session(self._bundle, graph, self._backend, **self._options)
        return open_origin(self._bundle, graph, chosen(able, self._precisions)[0])
