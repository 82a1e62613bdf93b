"""The processor, and how many of its cores this process may keep busy."""

from elastic_runtime.device import apple, linux
from elastic_runtime.device.record import Cpu
from elastic_runtime.device.sources import Sources, System
from elastic_runtime.errors import UsageError


def processor(sources: Sources | None = None) -> Cpu:
    """The processor that `sources` describe, by default this machine's. It never fails: what is not found out is None."""
    sources = sources or System()
    if sources.system == "Linux":
        return linux.cpu(sources)
    if sources.system == "Darwin":
        return apple.cpu(sources)
    count = len(sources.cpus() or ()) or 1
    if sources.system == "Windows":
        facts = sources.windows()
        model, flops = facts.model or sources.processor or "unknown", linux.FLOPS_PER_CLOCK.get(facts.vector or "", linux.SSE2)
        return Cpu(model=model, cores=count, usable=count, vector=facts.vector, flops_per_clock=flops, mhz=facts.mhz)
    return Cpu(model=sources.processor or "unknown", cores=count, usable=count, vector=None, flops_per_clock=1)


def usable_cores(sources: Sources | None = None) -> int:
    """Whole cores that this process may keep busy, at least 1: by affinity, a container's quota, and on a Mac the
    performance cores.
    """
    return max(1, int(processor(sources).usable))


def busy_cores(threads: int) -> int:
    """Cores that so many threads keep busy; 0 stands for one a core, of those that this process may use.

    Raises: UsageError for what is no such number.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
        raise UsageError(f"threads is a whole number, 0 for one a core, got {threads!r}")
    return threads or usable_cores()


def thread_limit(sources: Sources | None = None) -> int:
    """Threads that a library should start here, or 0 where every core is free to be used and its own choice, one a
    core, is right.

    Libraries look at the host's cores alone: on two of 64, ONNX Runtime's 64 threads made a picture a hundred times
    slower.
    """
    cpu = processor(sources)
    return 0 if cpu.usable >= cpu.cores else usable_cores(sources)
