"""Where the original of a bundle is, for whoever runs it beside the bundle."""

from pathlib import Path
from typing import TYPE_CHECKING

from elastic_export.sides import Sides
from elastic_runtime.contract.bundle import sha256
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.errors import ModelError

if TYPE_CHECKING:
    from elastic_export.capture.zoo import Request


def diffusers_folder(manifest: Manifest, checkpoint: Path | None = None) -> Path:
    """The very diffusers folder that a bundle was made from: a packaged sample's, or `checkpoint`.

    Raises: ModelError where it is not at hand, or `checkpoint` is another one.
    """
    from elastic_export.capture.zoo import locate, samples
    from elastic_export.foreign.folder import Folder

    name, wanted = manifest.model.name, manifest.provenance.checkpoint_sha256
    if fused := manifest.provenance.adapters:
        names = ", ".join(each.name for each in fused)
        raise ModelError(f"the original has {names} fused into its weights, which no folder holds: compare an export without --adapter")
    path = checkpoint or (locate(name) if name in samples() else None)
    if path is None:
        named = f" ({manifest.provenance.checkpoint})" if manifest.provenance.checkpoint else ""
        raise ModelError(f"the bundle does not hold the original's weights{named}: give its diffusers folder with --checkpoint DIR")
    if not path.is_dir():
        raise ModelError(f"there is no folder {path}")
    if Folder.open(path).component("transformer").sha256() != wanted:
        raise ModelError(f"{path} is not what the bundle was made from: the SHA-256 of its transformer is not the manifest's")
    return path


def picture_sides(manifest: Manifest) -> Sides | None:
    """The one size of a bundle's pictures; None where it draws any."""
    model = manifest.model
    if model.packed is None:
        return None
    height, width = (side * (model.vae.upscale if model.vae else 1) for side in model.sample_shape[1:])
    return Sides(height, width)


def request(manifest: Manifest, checkpoint: Path | None = None) -> "Request":
    """How the zoo loads the very model that a bundle was made from.

    Raises: ModelError where its weights are not at hand, or `checkpoint` holds other ones.
    """
    from elastic_export.capture.zoo import FAMILIES, Request, samples
    from elastic_export.foreign.weights import checkpoint_files, digest

    model, wanted = manifest.model, manifest.provenance.checkpoint_sha256
    if model.name in samples() and sha256(samples()[model.name].with_suffix(".safetensors")) == wanted:
        return Request(model.name)
    if model.family not in FAMILIES:
        raise ModelError(f"this version has no family {model.family!r}; it has {', '.join(FAMILIES)}")
    if model.weights == "random":
        return Request(model.family, random_weights=True, overrides=model.config)
    if checkpoint is None:
        named = f" ({manifest.provenance.checkpoint})" if manifest.provenance.checkpoint else ""
        raise ModelError(f"the bundle does not hold the original's weights{named}: give them with --checkpoint FILE")
    if not checkpoint.exists():
        raise ModelError(f"there is no file {checkpoint}")
    if digest(checkpoint_files(checkpoint)) != wanted:
        raise ModelError(f"{checkpoint} is not what the bundle was made from: its SHA-256 is not the manifest's")
    return Request(model.family, checkpoint, overrides=model.config)
