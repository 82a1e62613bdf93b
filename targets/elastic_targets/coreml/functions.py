"""One package of many functions: equal weights are stored once (iOS 18, macOS 15)."""

from collections.abc import Mapping
from pathlib import Path

from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction


def join(parts: Mapping[str, Path], package: Path) -> None:
    """Write `package` with a function for each part (name -> package with a function `main`); the last is the default."""
    descriptor = MultiFunctionDescriptor()
    for name, part in parts.items():
        descriptor.add_function(str(part), "main", name)
    descriptor.default_function_name = list(parts)[-1]
    save_multifunction(descriptor, str(package))
