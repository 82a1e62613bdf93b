"""A diffusers folder: which components it has.

A folder holds a sub-folder for each component and a `model_index.json` that lists them; without that file the sub-folders count.
Only safetensors are read, whole or in shards.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic_export.foreign.adapters import Adapter
from elastic_export.foreign.component import Component
from elastic_export.foreign.reading import read_json
from elastic_runtime.errors import ModelError

INDEX = "model_index.json"
# What `--components` calls parts of a folder -> the sub-folders
COMPONENTS = {
    "transformer": ("transformer",),
    "vae": ("vae",),
    "text": ("text_encoder", "text_encoder_2", "text_encoder_3"),
}
ENCODER = "encoder"  # the other half of the VAE, which only drawing from pictures needs: made where it is asked for


@dataclass(frozen=True)
class Folder:
    """A diffusers folder. `listed` are the components that it should have, by class where its index tells (`indexed`),
    which names the `pipeline` too, whether the model is `distilled` to few steps, and perhaps the `layers` of a language model whose
    states it takes. `adapters` are to be fused into its components."""

    path: Path
    listed: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)
    scheduled: bool = False
    indexed: bool = True
    pipeline: str = ""
    distilled: bool = False
    layers: tuple[Any, ...] = ()
    adapters: tuple[Adapter, ...] = ()

    @classmethod
    def open(cls, path: Path, adapters: tuple[Adapter, ...] = ()) -> "Folder":
        """Read the index; raises ModelError for a folder without a transformer, or without a component that an adapter changes."""
        known = [name for names in COMPONENTS.values() for name in names]
        if (path / INDEX).is_file():
            index = read_json(path / INDEX)
            named = {name: index.get(name) for name in known}
            listed = {name: str(entry[-1]) for name, entry in named.items() if isinstance(entry, list) and entry and entry[-1]}
            labels, layers = index.get("id2label"), index.get("text_encoder_select_layers")
            folder = cls(
                path,
                listed,
                dict(labels) if isinstance(labels, dict) else {},
                scheduled=bool(index.get("scheduler")),
                pipeline=str(index.get("_class_name") or ""),
                distilled=index.get("is_distilled") is True,
                layers=tuple(layers) if isinstance(layers, list) else (),
                adapters=adapters,
            )
        else:
            folder = cls(path, {name: "" for name in known if (path / name).is_dir()}, indexed=False, adapters=adapters)
        if "transformer" not in folder.listed:
            folders = ", ".join(sorted(each.name for each in path.iterdir() if each.is_dir())) or "no sub-folders"
            raise ModelError(f"{path} is not a diffusers folder of a diffusion transformer: it has no transformer, but {folders}")
        for adapter in adapters:
            if lost := [name for name in adapter.parts if name not in folder.listed]:
                key = next(iter(adapter.parts[lost[0]].values())).key
                raise ModelError(f"{adapter.path} has {key}, and {path} has no {lost[0]}, but {', '.join(folder.listed)}")
        return folder

    def choose(self, components: tuple[str, ...] | None) -> list[str]:
        """Sub-folders of the chosen components (None: all), in the order of `COMPONENTS`, and after them `ENCODER` where it is chosen.

        Raises: ModelError for a component that there is not, or that is listed and missing.
        """
        if unknown := sorted(set(components or ()) - {*COMPONENTS, ENCODER}):
            raise ModelError(f"--components are {', '.join((*COMPONENTS, ENCODER))}, got {', '.join(unknown)}")
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
        if ENCODER not in (components or ()):
            return chosen
        if "vae" not in chosen:
            raise ModelError(f"the {ENCODER} goes with the rest of its VAE: --components transformer,vae,{ENCODER}")
        return [*chosen, ENCODER]

    def component(self, name: str) -> Component:
        """One of its components, which may turn out not to be there."""
        return Component(self.path / name, self.adapters)
