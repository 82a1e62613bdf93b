"""The door to the two TensorRT builders: which is here, its version, and the GPU generations that it can build for."""

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from elastic_runtime.errors import MissingError, UsageError
from elastic_runtime.sessions import trt as device

Name = Literal["tensorrt", "tensorrt_rtx"]
TURING = 75
ON_TURING = ("fp16", "int8qdq")  # what tensorrt-rtx builds for it
# The first generations whose matrix units have the types that a graph multiplies; both builders refuse older ones.
SINCE = {"int4qdq": 80, "fp8": 89, "nvfp4": 100}
CHOICES = ("auto", "rtx", "tensorrt")
_MODULES: dict[str, Name] = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
_EXTRAS = {"rtx": "rtx", "tensorrt": "trt"}


@dataclass(frozen=True)
class Builder:
    """One installed builder and the GPU generations `sms` (89 for 8.9) that it can build for here."""

    name: Name
    library: Any
    version: str
    sms: tuple[int, ...]

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds for GPUs that are not here."""
        return hasattr(self.library, "ComputeCapability")

    def engines(self, asked: tuple[int, ...], precision: str) -> tuple[tuple[int, ...], ...]:
        """Divide generations (all that take the precision, where none is asked for) into engines that serve several.

        An RTX engine for Ampere and later is no larger than one for a single generation; Turing needs its own.

        Raises: UsageError for a generation that has not what the precision multiplies, and for Turing where it is not built for it.
        """
        by_name = bool(asked)
        if not asked and device.gpu()[0] == TURING:  # unasked, at least the GPU of this machine
            asked = (TURING,)
        since, named = SINCE.get(precision, 0), asked or self.sms
        able = {sm for sm in named if sm >= since}
        if old := sorted(set(named) - able if asked or not able else ()):
            fitting = ", ".join(name for name in ("fp16", "int8qdq", *SINCE) if SINCE.get(name, 0) <= min(old) and name != precision)
            leave = f"leave {'it' if len(old) == 1 else 'them'} out of --sm, or " if by_name else ""
            raise UsageError(
                f"{precision} needs a GPU of sm {since} or later, got sm {_list(old)}: {leave}choose a --precision that "
                f"{'it' if len(old) == 1 else 'they'} can multiply: {fitting}"
            )
        turing = self.ahead_of_time and TURING in able
        if turing and precision not in ON_TURING and asked:
            leave = f"leave {TURING} out of --sm, or " if by_name else ""
            raise UsageError(
                f"{self} builds only {' and '.join(ON_TURING)} graphs for sm {TURING}, this one is {precision}: {leave}add --precision fp16"
            )
        apart = {TURING} if self.ahead_of_time else set()
        engines: list[tuple[int, ...]] = [(TURING,)] if turing and precision in ON_TURING else []
        if others := sorted(able - apart):
            engines.append(tuple(others))
        return tuple(engines)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def choose(name: str, sms: tuple[int, ...]) -> Builder:
    """The builder called `name` (rtx, tensorrt), or for `auto` the first that is here and builds for all of `sms`.

    Raises: UsageError for an unknown name or a generation that it does not build for (naming those that it does);
    MissingError where it is not installed, or needs a GPU that is not here.
    """
    if name not in CHOICES:
        raise UsageError(f"--builder must be one of {', '.join(CHOICES)}, got {name!r}")
    problems: list[UsageError | MissingError] = []
    if name == "auto" and not sms and (here := device.gpu()[0]):
        sms = (here,)  # unasked, at least the GPU of this machine
    for candidate in _MODULES if name == "auto" else [name]:
        try:
            builder = _open(candidate)
            if lacking := [sm for sm in sms if sm not in builder.sms]:
                advice = "Name some of these with --sm." if builder.ahead_of_time else "It builds only for the GPU of this machine."
                raise UsageError(f"{builder} does not build for sm {_list(lacking)} here; it builds for {_list(builder.sms)}. {advice}")
            return builder
        except (UsageError, MissingError) as problem:
            problems.append(problem)
    if len(problems) == 1:
        raise problems[0]
    usage = [problem for problem in problems if isinstance(problem, UsageError)]
    raise (UsageError if usage else MissingError)(". ".join(str(problem).rstrip(".") for problem in usage or problems))


def _list(sms: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, sms)) or "none"


def _open(name: str) -> Builder:
    module = _MODULES[name]
    try:
        library = importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: the package is there but its shared libraries are not
        package, extra = module.replace("_", "-"), _EXTRAS[name]
        raise MissingError(f"the {name} builder needs the package {package} ({error}): pip install 'elastic-export[{extra}]'") from error
    if hasattr(library, "ComputeCapability"):
        members = library.ComputeCapability.__members__
        sms = tuple(sorted(int(member.removeprefix("SM")) for member in members if member.startswith("SM")))
        return Builder(module, library, str(library.__version__), sms)
    here, why = device.gpu()
    if here is None:
        raise MissingError(
            f"the tensorrt builder builds on the GPU that will run the engine, and {why}. Run this on that machine, or use --builder rtx."
        )
    return Builder(module, library, str(library.__version__), (here,))
