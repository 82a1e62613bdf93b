"""Bundles of FLUX's and SD3's form without files, and sessions for them whose velocity is known."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from fakes import manifest as elit_manifest

from elastic_runtime import Axis, Bundle, FakeSession, Session, Span
from elastic_runtime.contract.artifacts import FileEntry, Graph, TensorSpec
from elastic_runtime.contract.manifest import SCHEMA_VERSION, Manifest, Model, Patches, Text, TextEncoder, Vae
from elastic_runtime.contract.schedule import RectifiedFlow

CHANNELS, SIZE, UPSCALE, WIDTH, POOLED = 4, 2, 4, 6, 5
# velocity(feeds) -> (B, S, C): what a fake denoiser computes
Field = Callable[[Mapping[str, np.ndarray]], np.ndarray]

TOKENS = Axis(name="tokens", min=1, max=1024, step=1, default=1024, input="hidden_states", carrier="shape", dimension="S")
FLUX = Patches(size=SIZE, positions="img_ids", guidance_embeds=True)
SCHNELL = Patches(size=SIZE, positions="img_ids")
QWEN = Patches(size=SIZE, positions="img_ids", layout="centred")
FLUX2 = Patches(size=1, positions="img_ids", layout="sequence")
Z_IMAGE = Patches(size=SIZE, positions="img_ids", layout="after_text")
PADDED = Patches(size=SIZE, positions="img_ids", layout="after_text", multiple=8)
SD3 = Patches(size=SIZE, positions="pos_ids", table=24)


def spec(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)  # type: ignore[arg-type]


def denoiser_graph(patches: Patches, channels: int = CHANNELS, width: int = WIDTH, pooled: int = POOLED) -> Graph:
    inputs = [
        spec("hidden_states", "B", "S", channels * patches.size**2),
        spec("encoder_hidden_states", "B", "T", width),
        *([spec("pooled_projections", "B", pooled)] if pooled else []),
        spec("timestep", "B"),
    ]
    inputs += [spec(patches.positions, "S", patches.columns)]
    inputs += [spec("txt_ids", "T", patches.columns)] if patches.table is None else []
    inputs += [spec("guidance", "B")] if patches.guidance_embeds else []
    inputs += [spec("img_pad", "B", "S"), spec("txt_pad", "B", "T")] if patches.multiple else []
    least = patches.filled(1)
    return Graph(
        inputs=tuple(inputs),
        outputs=(spec("prediction", "B", "S", channels * patches.size**2),),
        dimensions={"B": Span(1, 4), "S": Span(least, 1024), "T": Span(least, 64)},
        artifacts=(),
    )


DECODER = Graph(
    inputs=(spec("latent", "B", CHANNELS, "h", "w"),),
    outputs=(spec("image", "B", 3, "H", "W"),),
    dimensions={"B": Span(1, 4), "h": Span(1, 64), "w": Span(1, 64), "H": Span(1, 256), "W": Span(1, 256)},
    artifacts=(),
)


def encoder_graph(length: int, **outputs: tuple[int | str, ...]) -> Graph:
    return Graph(
        inputs=(spec("input_ids", "B", length, dtype="int64"),),
        outputs=tuple(spec(name, *shape) for name, shape in outputs.items()),
        dimensions={"B": Span(1, 4)},
        artifacts=(),
    )


ENCODER = Graph(
    inputs=(spec("image", "B", 3, f"{UPSCALE}*h", f"{UPSCALE}*w"),),
    outputs=(spec("latent", "B", CHANNELS, "h", "w"),),
    dimensions={"B": Span(1, 1), "h": Span(1, 64), "w": Span(1, 64)},
    artifacts=(),
)


def encoder(graph: str, tokenizer: str, length: int, pad: int, *gives: str) -> TextEncoder:
    file = FileEntry(path=tokenizer, bytes=0, sha256="")
    return TextEncoder(graph=graph, tokenizer=file, max_length=length, pad_token_id=pad, gives=gives)  # type: ignore[arg-type]


def manifest(patches: Patches = FLUX, classes: int = 0, text: Text | None = None, decoder: bool = True, **graphs: Graph) -> Manifest:
    """A model of 64 x 64 px pictures: latents (4, 16, 16), so 64 tokens."""
    old = elit_manifest()
    model = Model(
        name="tiny",
        family="sd3" if patches.table else "flux",
        config={"scheduler": {"shift": 3.0}},
        prediction="velocity",
        schedule=RectifiedFlow(),
        sample_shape=(CHANNELS, 16, 16),
        num_classes=classes,
        null_label=classes,
        weights="random",
        vae=Vae(scaling_factor=2.0, shift_factor=0.5, upscale=UPSCALE),
        patches=patches,
        text=text,
        distilled=not classes and patches == SCHNELL,
    )
    every = {"denoiser": denoiser_graph(patches)} | ({"decoder": DECODER} if decoder else {}) | graphs
    axes = (msgspec.structs.replace(TOKENS, min=patches.filled(1), step=patches.multiple or 1),)
    return Manifest(schema_version=SCHEMA_VERSION, model=model, axes=axes, graphs=every, cost=(), provenance=old.provenance)


class Opener:
    """`open_graph` of a pipeline: keeps every session that it opened, in order, and what was open at the same time."""

    def __init__(self, whole: Manifest, field: Field, **others: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]):
        self.bundle = Bundle(Path("nowhere"), whole)
        self.opened: list[tuple[str, FakeSession]] = []
        self.beside: list[tuple[str, ...]] = []
        self._functions: dict[str, Any] = {"denoiser": lambda feeds: {"prediction": field(feeds).astype(np.float32)}, "decoder": decode}
        self._functions["encoder"] = encode
        self._functions |= others

    def __call__(self, graph: str) -> Session:
        self.beside.append(tuple(name for name, session in self.opened if not session.closed))
        session = FakeSession(self.bundle.manifest.graphs[graph], self._functions[graph])
        self.opened.append((graph, session))
        return session

    def calls(self, graph: str) -> list[dict[str, tuple[int, ...]]]:
        return [call for name, session in self.opened if name == graph for call in session.calls]


def decode(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first three channels, enlarged: an edge in the latent is an edge in the picture."""
    return {"image": feeds["latent"][:, :3].repeat(UPSCALE, axis=2).repeat(UPSCALE, axis=3)}


def encode(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The picture's first channel, a pixel a latent, in all channels of the latent."""
    return {"latent": feeds["image"][:, :1, ::UPSCALE, ::UPSCALE].repeat(CHANNELS, 1)}


def to_zero(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """The exact velocity of straight paths to an empty picture."""
    return feeds["hidden_states"] / feeds["timestep"][:, None, None]
