"""Sites of small bundles with the real onnxruntime-web, and a real browser to open them."""

import contextlib
import functools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from chromium import CHROMIUM, Browser, browser
from fakes import decoder_graph, write_manifest
from tiny import tiny_bundle

from elastic_runtime import Bundle, MissingError
from elastic_runtime.contract.artifacts import OnnxArtifact
from elastic_runtime.contract.bundle import entry
from elastic_runtime.contract.manifest import Vae
from elastic_web import library, server
from elastic_web.site import write

Visit = Callable[..., AbstractContextManager[Browser]]
READY = "document.getElementById('status')?.textContent === 'Ready.'"
WRONG = "document.getElementById('status')?.classList.contains('wrong')"
# The browser's own remark on a machine without a GPU.
REMARK = "No available adapters."


@pytest.fixture(scope="session")
def package(caches: Path) -> library.Library:
    """onnxruntime-web, once from the registry."""
    try:
        return library.library()
    except MissingError as error:
        pytest.skip(f"onnxruntime-web is not to be had: {error}")


@pytest.fixture(scope="session")
def sited(package: library.Library, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`sited(bundle, *precisions)`: the folder of a site that draws it."""

    def made(bundle: Path, *precisions: str) -> Path:
        return write(Bundle.open(bundle), tmp_path_factory.mktemp("sites") / "site", precisions or ("fp32",)).folder

    return made


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium-headless-shell")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="session")
def showing() -> Visit:
    """`with showing(browser, site) as page`: a site shown by our server and opened. `silent` has nothing said on its console by the end."""

    @contextlib.contextmanager
    def visiting(chromium: Browser, site: Path, until: str = READY, silent: bool = True) -> Iterator[Browser]:
        with server.listening(site, 0) as listens:
            thread = threading.Thread(target=listens.serve_forever, name="site")
            thread.start()
            try:
                chromium.console.clear()
                chromium.open(f"http://localhost:{listens.server_port}/")
                chromium.until("document.readyState === 'complete' && document.getElementById('name') !== null")
                chromium.until(f"({until}) || ({WRONG})")
                assert chromium.value(until), chromium.value("document.getElementById('status').textContent")
                yield chromium
                assert not silent or [line for line in chromium.console if line != REMARK] == []
            finally:
                chromium.open("about:blank")
                listens.shutdown()
                thread.join(30)

    return visiting


@pytest.fixture(scope="module")
def visit(chromium: Browser, showing: Visit) -> Visit:
    """The same in the module's own browser: `with visit(site) as page`."""
    return functools.partial(showing, chromium)


@pytest.fixture(scope="session")
def looped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the axis `loops`, on a cosine schedule, with random weights."""
    pytest.importorskip("torch", reason="exporting needs torch")
    import elastic_export

    folder = tmp_path_factory.mktemp("looped")
    config = {
        "input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "num_heads": 2, "num_classes": 10, "unique_blocks": 2,
        "loops": 3, "max_loops": 4,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return elastic_export.export("elt", output=folder / "bundle", config=folder / "config.json", random_weights=True).folder


@pytest.fixture(scope="session")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that draws latents of four channels, with a decoder of one layer that makes colours of twice the side."""
    onnx = pytest.importorskip("onnx", reason="writing the graph needs onnx")
    from onnx import TensorProto, helper, numpy_helper

    bundle = tiny_bundle(tmp_path_factory.mktemp("latent") / "bundle", 23)
    manifest = bundle.manifest
    described, path = decoder_graph(), bundle.folder / "onnx" / "decoder.onnx"
    weights = np.random.default_rng(0).standard_normal((12, 4, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["latent", "weights"], ["mixed"]),
        helper.make_node("DepthToSpace", ["mixed"], ["spread"], blocksize=2),
        helper.make_node("Tanh", ["spread"], ["image"]),
    ]
    shapes = [
        helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, list(spec.shape)) for spec in (*described.inputs, *described.outputs)
    ]
    graph = helper.make_graph(nodes, "decoder", shapes[:1], shapes[1:], [numpy_helper.from_array(weights, "weights")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), str(path))
    artifact = OnnxArtifact(precision="fp32", files=(entry(bundle.folder, path),), toolchain={}, opset=23)
    graphs = manifest.graphs | {"decoder": msgspec.structs.replace(described, artifacts=(artifact,))}
    model = msgspec.structs.replace(manifest.model, vae=Vae(scaling_factor=0.5, shift_factor=0.25, upscale=2))
    write_manifest(bundle.folder, msgspec.structs.replace(manifest, graphs=graphs, model=model))
    return bundle.folder
