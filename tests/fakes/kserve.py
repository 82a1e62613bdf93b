"""A stand-in for Triton: the KServe v2 protocol over HTTP, a model repository, and ONNX Runtime; it refuses what Triton would refuse."""

import importlib.util
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

KINDS = {"FP32": np.float32, "INT64": np.int64}
LENGTH = "Inference-Header-Content-Length"


def model_config(text: str) -> Any:
    """NVIDIA's own ModelConfig of a `config.pbtxt`. Its module lies in a package that asks for gRPC, which it does not need."""
    pytest.importorskip("tritonclient", reason="NVIDIA's schema of the configuration is in it")
    text_format = pytest.importorskip("google.protobuf.text_format", reason="the configuration is protobuf")
    (folder,) = importlib.util.find_spec("tritonclient").submodule_search_locations  # type: ignore[union-attr,misc]
    spec = importlib.util.spec_from_file_location("model_config_pb2", Path(folder) / "grpc" / "model_config_pb2.py")
    assert spec is not None
    assert spec.loader is not None
    global _schema
    if _schema is None:  # which may be registered once
        _schema = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_schema)
    return text_format.Parse(text, _schema.ModelConfig())


_schema: Any = None


class RefusedError(Exception):
    """A request that does not fit the configuration."""


class Model:
    """One model of the repository, opened."""

    def __init__(self, folder: Path):
        import onnxruntime

        self.config = model_config((folder / "config.pbtxt").read_text())
        assert self.config.name == folder.name
        assert self.config.platform == "onnxruntime_onnx"
        assert self.config.max_batch_size == 0
        path = folder / "1" / self.config.default_model_filename
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.runs: list[dict[str, tuple[int, ...]]] = []

    def infer(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        feeds = {}
        for spec in self.config.input:
            if spec.name not in given:
                raise RefusedError(f"expected an input {spec.name}")
            array, dims = given[spec.name], tuple(spec.dims)
            fits = array.ndim == len(dims) and all(d in (-1, n) for d, n in zip(dims, array.shape, strict=True))
            if array.dtype != KINDS[_type(self.config, spec)] or not fits:
                raise RefusedError(
                    f"unexpected shape or type for input '{spec.name}': expecting {list(spec.dims)}, got {list(array.shape)}"
                )
            feeds[spec.name] = array.reshape(tuple(spec.reshape.shape)) if spec.HasField("reshape") else array
        if unknown := given.keys() - feeds.keys():
            raise RefusedError(f"unexpected inputs {sorted(unknown)}")
        self.runs.append({name: array.shape for name, array in given.items()})
        names = [spec.name for spec in self.config.output]
        return dict(zip(names, self.session.run(names, feeds), strict=True))


def _type(config: Any, spec: Any) -> str:
    """`FP32` of TYPE_FP32."""
    values = type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number
    return str(values[spec.data_type].name.removeprefix("TYPE_"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    models: Mapping[str, Model]

    def do_GET(self) -> None:
        self._answer(200, b"" if self.path in ("/v2/health/live", "/v2/health/ready") else b'{"error": "not here"}')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.split("/")[3]
        try:
            assert self.path == f"/v2/models/{name}/infer"
            outputs = self.models[name].infer(_arrays(body, int(self.headers.get(LENGTH, len(body)))))
        except (KeyError, RefusedError) as error:
            self._answer(400, json.dumps({"error": str(error)}).encode())
            return
        described = [
            {"name": key, "datatype": "FP32", "shape": list(array.shape), "parameters": {"binary_data_size": array.nbytes}}
            for key, array in outputs.items()
        ]
        head = json.dumps({"model_name": name, "model_version": "1", "outputs": described}).encode()
        self._answer(200, head + b"".join(array.tobytes() for array in outputs.values()), {LENGTH: str(len(head))})

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _arrays(body: bytes, head: int) -> dict[str, np.ndarray]:
    arrays, place = {}, head
    for each in json.loads(body[:head])["inputs"]:
        size = each["parameters"]["binary_data_size"]
        arrays[each["name"]] = np.frombuffer(body[place : place + size], KINDS[each["datatype"]]).reshape(each["shape"])
        place += size
    assert place == len(body)
    return arrays


@contextmanager
def triton(repository: Path) -> Iterator[tuple[str, dict[str, Model]]]:
    """Serve a repository; its address, `host:port`, and its models."""
    models = {folder.name: Model(folder) for folder in sorted(repository.iterdir()) if folder.is_dir()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"models": models}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", models
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
