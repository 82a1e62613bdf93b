"""What a device can run with what is installed, and what installing something more would bring."""

from collections.abc import Iterator

from elastic_runtime.device.packages import PACKAGES
from elastic_runtime.device.record import Device

# Compute capabilities that TensorRT-RTX serves; the others are left to the full TensorRT.
RTX = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
CRAMPED = 1 << 30  # bytes; below it even a small model's process is a tight fit


def runtimes(device: Device) -> dict[str, str]:
    """Runtimes that can open a bundle's artifacts here, each with its version."""
    hardware = {
        None: True,
        "nvidia": nvidia(device) and "cuda-bindings" in device.backends,
        "apple": device.system == "Darwin",
    }
    usable = [name for name, package in PACKAGES.items() if package.backend and hardware[package.needs]]
    return {name: device.backends[name] for name in usable if name in device.backends}


def advice(device: Device) -> Iterator[str]:
    """What is missing, in sentences with the line to paste; nothing where all is well."""
    installed = device.backends
    if not runtimes(device):
        yield "nothing here can run a bundle: pip install 'elastic-export[ort]'"
    if nvidia(device):
        builders = _builders(device)
        if not builders:
            gpu, jetson = device.gpus[0], device.board is not None
            extras = "[rtx]' (or [trt])" if gpu.compute_capability in RTX else "[trt]'"
            line = "it comes with JetPack: sudo apt install nvidia-jetpack" if jetson else f"pip install 'elastic-export{extras}"
            yield f"{gpu.name} is here and TensorRT is not: {line}"
        elif "cuda-bindings" not in installed:
            yield f"{', '.join(sorted(builders))} cannot run without the CUDA bindings: pip install cuda-bindings"
    elif _builders(device):
        yield "TensorRT is installed and there is no NVIDIA GPU: engines can be built here, and not run"
    if (device.board or "").startswith("Apple") and "coremltools" not in installed:
        yield "the GPU and the Neural Engine need Core ML: pip install 'elastic-export[coreml]'"
    if device.power_mode == "low power" or (device.power_mode or "").startswith(("7W", "10W")):
        yield f"the power mode is {device.power_mode}: times measured now do not hold in another mode"
    if device.cpu.usable < device.cpu.cores:
        yield f"this process may use {device.cpu.usable:g} of {device.cpu.cores} cores: open sessions with as many threads, not more"
    if device.memory.available is not None and device.memory.available < CRAMPED:
        yield f"only {device.memory.available / 1e6:.0f} MB of memory are free: choose a budget with --max-memory"
    if "torch" not in installed:
        yield "bundles can be opened here and not made: that needs pip install 'elastic-export[torch]'"


def nvidia(device: Device) -> bool:
    """Whether there is a GPU that TensorRT runs on."""
    return bool(device.gpus) and not (device.board or "").startswith("Apple")


def _builders(device: Device) -> set[str]:
    """The TensorRT libraries that are installed."""
    return {name for name, package in PACKAGES.items() if package.needs == "nvidia"} & device.backends.keys()
