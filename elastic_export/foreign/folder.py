"""Reading a diffusers folder: which components it has, their configs, and their weights, one tensor at a time.

A folder holds a sub-folder for each component and a `model_index.json` that lists them; without that file the sub-folders count.
Only safetensors are read, whole or in shards.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from elastic_export.foreign.checkpoint import fit
from elastic_runtime.errors import MissingError, ModelError

INDEX = "model_index.json"
# What `--components` calls parts of a folder -> the sub-folders
COMPONENTS = {
    "transformer": ("transformer",),
    "vae": ("vae",),
    "text": ("text_encoder", "text_encoder_2", "text_encoder_3"),
}
_STEMS = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True)
class Folder:
    """A diffusers folder. `listed` are the components that it should have, by class where its index tells (`indexed`)."""

    path: Path
    listed: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)
    scheduled: bool = False
    indexed: bool = True

    @classmethod
    def open(cls, path: Path) -> "Folder":
        """Read the index; raises ModelError for a folder without a transformer."""
        known = [name for names in COMPONENTS.values() for name in names]
        if (path / INDEX).is_file():
            index = read_json(path / INDEX)
            listed = {name: str(index[name][-1]) for name in known if isinstance(index.get(name), list) and index[name][-1]}
            labels = index.get("id2label")
            folder = cls(path, listed, dict(labels) if isinstance(labels, dict) else {}, scheduled=bool(index.get("scheduler")))
        else:
            folder = cls(path, {name: "" for name in known if (path / name).is_dir()}, indexed=False)
        if "transformer" not in folder.listed:
            folders = ", ".join(sorted(each.name for each in path.iterdir() if each.is_dir())) or "no sub-folders"
            raise ModelError(f"{path} is not a diffusers folder of a diffusion transformer: it has no transformer, but {folders}")
        return folder

    def choose(self, components: tuple[str, ...] | None) -> list[str]:
        """Sub-folders of the chosen components (None: all), in the order of `COMPONENTS`.

        Raises: ModelError for a component that there is not, or that is listed and missing.
        """
        if unknown := sorted(set(components or ()) - set(COMPONENTS)):
            raise ModelError(f"--components are {', '.join(COMPONENTS)}, got {', '.join(unknown)}")
        chosen = []
        for word, names in COMPONENTS.items():
            if components is not None and word not in components:
                continue
            here = [name for name in names if name in self.listed]
            if components is not None and not here:
                raise ModelError(f"{self.path} has no {word}; it has {', '.join(self.listed)}")
            for name in here:
                if not (self.path / name / "config.json").is_file():
                    others = ",".join(each for each, parts in COMPONENTS.items() if each != word and set(parts) & set(self.listed))
                    kind = f" ({self.listed[name]})" if self.listed[name] else ""
                    instead = "" if word == "transformer" else f", or leave it out with --components {others}"
                    raise ModelError(
                        f"{self.path} lacks its component {name}{kind}: there is no {name}/config.json. Download the folder again{instead}"
                    )
            chosen += here
        return chosen

    def config(self, component: str) -> dict[str, Any]:
        """The component's config.json; raises ModelError where it cannot be read."""
        return read_json(self.path / component / "config.json")

    def weight_files(self, component: str) -> list[Path]:
        """The component's safetensors, in full precision where there is a choice.

        Raises: ModelError where there are none, or a shard is missing.
        """
        folder = self.path / component
        for stem in _STEMS:
            for variant in ("", ".fp16", ".bf16"):
                index = folder / f"{stem}.safetensors.index{variant}.json"
                index = index if index.is_file() else folder / f"{stem}{variant}.safetensors.index.json"
                if index.is_file():
                    shards = sorted({folder / str(name) for name in read_json(index).get("weight_map", {}).values()})
                    if lost := [shard.name for shard in shards if not shard.is_file()]:
                        raise ModelError(f"{folder} lacks {', '.join(lost[:3])}, which {index.name} lists: download it again")
                    return shards
                if (file := folder / f"{stem}{variant}.safetensors").is_file():
                    return [file]
        has = ", ".join(sorted(each.name for each in folder.iterdir())) or "nothing"
        raise ModelError(
            f"{folder} holds no safetensors weights; it has {has}. Pickled weights could run code and are not read: "
            "save the component again with safe_serialization=True"
        )

    def weights(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of a component, each read when its turn comes, in the file's precision."""
        for file in self.weight_files(component):
            with _reading(file) as opened:
                for name in opened.keys():  # noqa: SIM118  it is no dict
                    yield name, opened.get_tensor(name)

    def parameters(self, component: str) -> int:
        """Number of a component's weights, from the files' headers alone."""
        count = 0
        for file in self.weight_files(component):
            with _reading(file) as opened:
                for name in opened.keys():  # noqa: SIM118
                    count += torch.Size(opened.get_slice(name).get_shape()).numel()
        return count

    def sha256(self, component: str) -> str:
        """SHA-256 of the component's weight files, one after another."""
        digest = hashlib.sha256()
        for file in self.weight_files(component):
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()

    def build(self, component: str, kind: type) -> nn.Module:
        """The component as diffusers' class `kind`, without memory for its weights.

        Raises: ModelError where its config is of another class, or has fields that do not go together.
        """
        config = self.config(component)
        if (name := config.get("_class_name", kind.__name__)) != kind.__name__:
            raise ModelError(f"{self.path / component} is a {name}, not a {kind.__name__}")
        try:
            with torch.device("meta"):
                module: nn.Module = kind.from_config(config)  # type: ignore[attr-defined]
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ModelError(f"{self.path / component / 'config.json'} does not describe a {kind.__name__}: {error}") from None
        return module

    def load(self, component: str, kind: type) -> nn.Module:
        """The component in float32. A float32 file's weights stay on disk until they are used; others are converted one by one.

        Raises: ModelError naming missing, unexpected and misshapen weights.
        """
        module = self.build(component, kind)
        fit(module, {name: value.float() for name, value in self.weights(component)}, str(self.path / component), kind.__name__)
        return module.eval().requires_grad_(False)


@contextmanager
def _reading(file: Path) -> Iterator[Any]:
    """An open safetensors file; raises ModelError for one that is damaged, cut off, or only a pointer to the real one."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        with file.open("rb") as stream:
            pointer = stream.read(40).startswith(b"version https://git-lfs")
        if pointer:
            raise ModelError(f"{file} is a git-lfs pointer and not the weights: run git lfs pull in its folder") from None
        size = file.stat().st_size
        raise ModelError(f"{file} is damaged or incomplete, {size} bytes ({error}): download or copy it again") from None


def diffusers_class(name: str) -> type:
    """A class of diffusers; raises MissingError with the line that installs it."""
    try:
        import diffusers
    except ImportError as error:
        raise MissingError(f"a diffusers folder needs diffusers ({error}): pip install 'elastic-export[flux]'") from error
    return getattr(diffusers, name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the model; raises ModelError saying what is wrong with it."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}. Download or copy it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
