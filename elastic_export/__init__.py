"""Elastic diffusion transformers, compiled once with their compute axis open.

    import elastic_export

    bundle = elastic_export.export("elit-mnist", output="digits", latents="32-256")
    elastic_export.verify("digits")

The command line is `elastic-export`; the torch-free half that leaves for the device is `elastic_runtime`. Importing this package
imports nothing else: what it offers is loaded when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_export.api import elasticize, export, models, plan, push, verify

__version__ = "0.1.0"
__all__ = ["__version__", "elasticize", "export", "models", "plan", "push", "verify"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from elastic_export import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
