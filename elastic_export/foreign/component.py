"""One component of a diffusers folder: a `config.json`, and safetensors beside it, whole or in shards. Nothing else there is read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from elastic_export.foreign.adapters import Adapter, changes
from elastic_export.foreign.reading import read_json
from elastic_export.foreign.weights import PLAIN, Naming, digest, fit, tensors, weight_files
from elastic_runtime.errors import ElasticError, MissingError, ModelError

MOST_LAYERS = 10_000
Value = TypeVar("Value")


@dataclass(frozen=True)
class Component:
    """A folder with a component's config and weights, and `adapters`, of which those for it are added as it is filled."""

    path: Path
    adapters: tuple[Adapter, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json; raises ModelError where it cannot be read."""
        return read_json(self.path / "config.json")

    def weight_files(self) -> list[Path]:
        """Its safetensors; raises ModelError where there are none, a shard is missing, or its config says that they are quantised."""
        if quantised := self.config.get("quantization_config"):
            kind = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
            raise ModelError(
                f"{self.path} is quantised ({kind}, says its config.json), and an export starts from plain weights: take it in float32, "
                "bfloat16 or float16"
            )
        return weight_files(self.path)

    def parameters(self) -> int:
        """Number of its weights, from the files' headers alone."""
        return sum(stored.numel() for _, stored in tensors(self.weight_files()))

    def sha256(self) -> str:
        """SHA-256 of its weight files, one after another."""
        return digest(self.weight_files())

    def build(self, kind: type) -> nn.Module:
        """It as diffusers' class `kind`, without memory for its weights.

        Raises: ModelError where its config is of another class, or has fields that do not go together.
        """
        config = self.config
        if (name := config.get("_class_name", kind.__name__)) != kind.__name__:
            raise ModelError(f"{self.path} is a {name}, not a {kind.__name__}")

        def make() -> nn.Module:
            with torch.device("meta"):
                module: nn.Module = kind.from_config(config)  # type: ignore[attr-defined]
            return module

        return self.described(make, kind.__name__)

    def described(self, make: Callable[[], Value], what: str) -> Value:
        """What `make` builds of its config; raises ModelError where the config does not describe a `what`."""
        config = self.config
        inner = [item for value in config.values() if isinstance(value, dict) for item in value.items()]
        for name, value in [*config.items(), *inner]:  # which are built one by one, for ever if need be
            if "layers" in name and isinstance(value, int) and value > MOST_LAYERS:
                raise ModelError(f"{self.path / 'config.json'} does not describe a {what}: {name} is {value}")
        try:
            return make()
        except ElasticError:
            raise
        except Exception as error:  # whatever the libraries raise
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelError(f"{self.path / 'config.json'} does not describe a {what}: {why}") from None

    def load(self, kind: type) -> nn.Module:
        """It as diffusers' class `kind`, in float32; raises as `build` and `fill`."""
        return self.fill(self.build(kind))

    def fill(self, module: nn.Module, naming: Naming = PLAIN, what: str = "") -> nn.Module:
        """`module` with its weights in float32, which stay on disk until they are used.

        Raises: ModelError naming missing, unexpected, misshapen and quantised weights, and what an adapter has for another model.
        """
        name = what or type(module).__name__
        changed = changes(self.adapters, self.path.name, module, naming, name)
        fit(module, tensors(self.weight_files()), str(self.path), name, naming, changed)
        return module.eval().requires_grad_(False)


def diffusers_class(name: str) -> type:
    """A class of diffusers; raises MissingError with the line that installs it."""
    try:
        import diffusers
    except ImportError as error:
        raise MissingError(f"a diffusers folder needs diffusers ({error}): pip install 'elastic-export[flux]'") from error
    return member(diffusers, name)


def member(library: Any, name: str) -> Any:
    """A class of diffusers or transformers; raises MissingError where this version has it not, which is older than the model."""
    if (kind := getattr(library, name, None)) is None:
        package, version = library.__name__, library.__version__
        raise MissingError(f"the model needs {package}'s {name}, which {package} {version} has not: pip install --upgrade {package}")
    return kind
