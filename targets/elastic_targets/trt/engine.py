"""Build one engine from a parsed network: configuration, profiles, progress and cancellation."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elastic_runtime.contract.artifacts import Graph, Profile
from elastic_runtime.errors import InferenceError, MissingError
from elastic_targets.trt.builder import Builder
from elastic_targets.trt.network import Parsed

# fraction(done): told between 0 and 1 while a build runs
OnFraction = Callable[[float], None]
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Settings:
    """What of an engine is not its network and its shapes; part of its cache key."""

    precision: str
    refit: bool = False
    strip: bool = False
    weight_streaming: bool = False
    version_compatible: bool = False


def build(
    builder: Builder,
    parsed: Parsed,
    graph: Graph,
    profiles: tuple[Profile, ...],
    sms: tuple[int, ...],
    settings: Settings,
    timings: bytes,
    on_fraction: OnFraction,
) -> tuple[Any, bytes]:
    """Build and serialize an engine; return it (a buffer) and the builder's timing cache, empty for builders that time nothing.

    Whatever `on_fraction` raises, KeyboardInterrupt included, cancels the build at its next step and is raised again.

    Raises: MissingError where the builder lacks a GPU driver for what was asked; InferenceError with the builder's words.
    """
    library = builder.library
    config = parsed.builder.create_builder_config()
    monitor = _monitor(library)
    config.progress_monitor = monitor
    _configure(builder, config, sms, settings)
    for profile in profiles:
        config.add_optimization_profile(_optimization_profile(parsed, graph, profile))
    timing = None
    if not builder.ahead_of_time:
        timing = config.create_timing_cache(timings)
        config.set_timing_cache(timing, ignore_mismatch=False)
    result = _run(lambda: parsed.builder.build_serialized_network(parsed.network, config), monitor, on_fraction)
    if result is None:
        _explain(builder, sms, settings, parsed.logger.errors)
    return result, bytes(memoryview(timing.serialize())) if timing else b""


def _configure(builder: Builder, config: Any, sms: tuple[int, ...], settings: Settings) -> None:
    library, flags = builder.library, builder.library.BuilderFlag
    if builder.ahead_of_time:
        config.num_compute_capabilities = len(sms)
        for i, sm in enumerate(sms):
            if not config.set_compute_capability(getattr(library.ComputeCapability, f"SM{sm}"), i):
                raise InferenceError(f"{builder} refused to build for sm {sm}; this is a bug, please report it")
        # What lets CUDA graphs capture an RTX engine, and what one that streams its weights does not take.
        if hasattr(flags, "REQUIRE_USER_ALLOCATION") and not settings.weight_streaming:
            config.set_flag(flags.REQUIRE_USER_ALLOCATION)
    if settings.precision == "fp32":
        config.clear_flag(flags.TF32)  # on by default; its 10-bit mantissa would miss the float32 tolerance
    asked = {
        "REFIT": settings.refit, "STRIP_PLAN": settings.strip, "WEIGHT_STREAMING": settings.weight_streaming,
        "VERSION_COMPATIBLE": settings.version_compatible,
    }  # fmt: skip
    for name, value in asked.items():
        if value:
            config.set_flag(getattr(flags, name))


def _optimization_profile(parsed: Parsed, graph: Graph, profile: Profile) -> Any:
    specs = {spec.name: spec for spec in graph.inputs}
    native = parsed.builder.create_optimization_profile()
    for i in range(parsed.network.num_inputs):
        tensor = parsed.network.get_input(i)
        if -1 in tuple(tensor.shape):
            spec = specs[tensor.name]
            native.set_shape(tensor.name, profile.shape(spec, "min"), profile.shape(spec, "opt"), profile.shape(spec, "max"))
    return native


def _explain(builder: Builder, sms: tuple[int, ...], settings: Settings, errors: list[str]) -> None:
    reason = errors[-1] if errors else "no reason given"
    if (settings.refit or settings.strip) and "CUDA_SUCCESS" in reason:
        raise MissingError(
            f"{builder} needs a GPU and its driver to build with --refit or --strip: run this on a machine with one, or leave them out"
        )
    raise InferenceError(f"{builder} failed to build for sm {', '.join(map(str, sms))}: {reason}")


def _monitor(library: Any) -> Any:
    """A progress monitor that turns the builder's nested phases into one growing fraction, and can call the build off."""

    class Monitor(library.IProgressMonitor):
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self.fraction = 0.0
            self.cancelled = False
            self._phases: dict[str, tuple[str | None, int, int]] = {}  # name -> (parent, steps done, steps)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._phases[name] = (parent, 0, max(steps, 1))

        def step_complete(self, name: str, step: int) -> bool:
            parent, _, steps = self._phases.get(name, (None, 0, 1))
            self._phases[name] = (parent, step + 1, steps)
            self.fraction = max(self.fraction, self._so_far(name))
            return not self.cancelled

        def phase_finish(self, name: str) -> None:
            self._phases.pop(name, None)

        def _so_far(self, name: str | None) -> float:
            inner = 0.0
            while name in self._phases:
                parent, done, steps = self._phases[name]
                inner = min((done + inner) / steps, 1.0)
                name = parent
            return inner

    return Monitor()


def _run(work: Callable[[], Any], monitor: Any, on_fraction: OnFraction) -> Any:
    """Run `work` in a thread, so that Ctrl-C and callbacks happen in the caller's and never inside the builder."""
    outcome: list[Any] = []

    def target() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=target, name="tensorrt-build")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            on_fraction(monitor.fraction)
    except BaseException:
        monitor.cancelled = True
        thread.join()
        raise
    if isinstance(outcome[0], Exception):
        raise InferenceError(f"the TensorRT builder failed: {outcome[0]}") from outcome[0]
    return outcome[0]
