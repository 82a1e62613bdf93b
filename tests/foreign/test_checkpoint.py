import argparse
import dataclasses
import json
import os
import pickle
import random
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are read with torch")

from safetensors.torch import save_file  # noqa: E402

from elastic_export.capture.zoo import Request, load  # noqa: E402
from elastic_export.families.elit.backbone import ElitParams  # noqa: E402
from elastic_export.families.elit.sit import FAMILY, Elit  # noqa: E402
from elastic_export.foreign.checkpoint import load_weights, read_checkpoint  # noqa: E402
from elastic_runtime import ModelError  # noqa: E402


def public(golden: Path) -> dict[str, Any]:
    """The content of a public checkpoint."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content: dict[str, Any] = torch.load(golden / "elit-c.pt", weights_only=True)
    return content


@pytest.fixture
def written(golden: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], Any]], Request]:
    """A request for elit-c whose EMA weights were changed."""

    def write(change: Callable[[dict[str, Any]], Any]) -> Request:
        content = public(golden)
        change(content["ema"])
        torch.save(content, tmp_path / "changed.pt")
        return Request("elit-sit", tmp_path / "changed.pt", golden / "elit-c.json")

    return write


class Payload:
    """Unpickled by a reader that runs pickles, this writes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def test_the_moving_average_is_used_and_args_are_kept(golden: Path) -> None:
    checkpoint = read_checkpoint(golden / "elit-c.pt")
    content = public(golden)
    assert checkpoint.args["encoder_depth"] == 1
    assert checkpoint.weights.keys() == content["ema"].keys()
    assert all(torch.equal(value, content["ema"][name]) for name, value in checkpoint.weights.items())


@pytest.mark.parametrize(
    "wrap", [lambda ema: ema, lambda ema: {"model": ema}, lambda ema: {"state_dict": ema}, lambda ema: {"ema": ema, "model": {}}]
)
def test_bare_and_wrapped_weights_are_found(wrap: Callable[[Any], Any], golden: Path, tmp_path: Path) -> None:
    torch.save(wrap(public(golden)["ema"]), tmp_path / "weights.pt")
    assert len(read_checkpoint(tmp_path / "weights.pt").weights) == len(public(golden)["ema"])


def test_the_old_file_format_is_read(golden: Path, tmp_path: Path) -> None:
    torch.save(public(golden), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "old.pt").args["encoder_depth"] == 1


def test_safetensors_hold_the_same_model(golden: Path, tmp_path: Path) -> None:
    save_file({name: value.contiguous().clone() for name, value in public(golden)["ema"].items()}, tmp_path / "c.safetensors")
    one, two = (load(Request("elit-sit", path, golden / "elit-c.json")) for path in (golden / "elit-c.pt", tmp_path / "c.safetensors"))
    assert one.params == two.params
    ours, theirs = one.module.state_dict(), two.module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_truncated_file_is_said_to_be_unreadable(kind: str, keep: float, golden: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    weights = public(golden)["ema"]
    if kind == "pt":
        torch.save(weights, whole)
    else:
        save_file({name: value.contiguous().clone() for name, value in weights.items()}, whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ModelError, match=rf"cut\.{kind} is not a readable .* download or copy it again"):
        read_checkpoint(cut)


@pytest.mark.parametrize(
    "content", [b"hello, these are words\n" * 20, b"<html><body>404</body></html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_file_of_another_kind_is_said_to_be_unreadable(kind: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"page.{kind}").write_bytes(content)
    with pytest.raises(ModelError, match=rf"page\.{kind} is not a readable"):
        read_checkpoint(tmp_path / f"page.{kind}")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    target, path = tmp_path / "it-ran", tmp_path / "evil.pt"
    torch.save({"ema": {"x": torch.zeros(1)}, "args": Payload(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"evil\.pt was refused: it holds \w+\.system, which could run code"):
        read_checkpoint(path)
    assert not target.exists()


def test_a_plain_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    target, path = tmp_path / "it-ran", tmp_path / "evil.bin"
    path.write_bytes(pickle.dumps({"ema": Payload(target)}))
    with pytest.raises(ModelError, match=r"evil\.bin was refused"):
        read_checkpoint(path)
    assert not target.exists()


def test_a_pickled_module_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "module.pt")
    with pytest.raises(ModelError, match=r"holds torch\.nn\.modules\.linear\.Linear"):
        read_checkpoint(tmp_path / "module.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a dict of weights"),
        (torch.zeros(3), "holds a Tensor, not a dict of weights"),
        ({}, "holds no weights"),
        ({"ema": {}, "steps": 3}, "holds no weights: expected tensors, or a dict with 'ema' or 'model'"),
        ({"steps": 3, "lr": 0.1}, "it has steps, lr"),
        ({0: torch.zeros(1)}, "holds no weights"),
    ],
)
def test_content_that_is_no_checkpoint_is_described(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ModelError, match=message):
        read_checkpoint(tmp_path / "odd.pt")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.pt does not exist"):
        read_checkpoint(tmp_path / "nowhere.pt")


def test_another_family_is_said_to_be_no_elit(tmp_path: Path, golden: Path) -> None:
    """What a DiT with learned positions and no latents would hold."""
    other = {
        "x_embedder.proj.weight": torch.zeros(16, 4, 2, 2),
        "pos_embed": torch.zeros(1, 64, 16),
        "blocks.0.attn.qkv.weight": torch.zeros(48, 16),
    }
    torch.save({"ema": other}, tmp_path / "dit.pt")
    with pytest.raises(ModelError, match="not an ELIT checkpoint: it lacks y_embedder"):
        load(Request("elit-sit", tmp_path / "dit.pt", golden / "elit-c.json"))


def test_missing_weights_are_named(written: Callable[..., Request]) -> None:
    with pytest.raises(ModelError, match=r"does not fit elit-sit: it lacks blocks\.1\.attn\.qkv\.weight$"):
        load(written(lambda ema: ema.pop("blocks.1.attn.qkv.weight")))


def test_unknown_weights_are_named_and_the_many_counted(written: Callable[..., Request]) -> None:
    with pytest.raises(ModelError, match=r"has unknown colour\.0, colour\.1, colour\.2, colour\.3 and 2 more$"):
        load(written(lambda ema: ema.update({f"colour.{i}": torch.zeros(1) for i in range(6)})))


def test_misshapen_weights_are_named_with_both_shapes(written: Callable[..., Request]) -> None:
    with pytest.raises(ModelError, match=r"has blocks\.1\.attn\.proj\.bias of shape \(33,\) where the model has \(32,\)"):
        load(written(lambda ema: ema.update({"blocks.1.attn.proj.bias": torch.zeros(33)})))


def test_several_faults_are_named_together(written: Callable[..., Request]) -> None:
    def change(ema: dict[str, Any]) -> None:
        ema["extra"] = torch.zeros(1)
        ema["final_layer.linear.bias"] = torch.zeros(1)
        del ema["t_embedder.mlp.0.bias"]

    with pytest.raises(ModelError, match=r"has final_layer.*; it has unknown extra; it lacks t_embedder\.mlp\.0\.bias"):
        load(written(change))


def test_a_block_that_is_missing_as_a_whole_is_told_by_the_depth(written: Callable[..., Request]) -> None:
    def change(ema: dict[str, Any]) -> None:
        for name in [name for name in ema if name.startswith("blocks.3.")]:
            del ema[name]

    with pytest.raises(ModelError, match="depth is 3 by the checkpoint's shapes but 4 by config"):
        load(written(change))


def test_training_only_weights_are_ignored_and_reported(written: Callable[..., Request]) -> None:
    model = load(written(lambda ema: ema.update({"projectors.0.weight": torch.zeros(1), "projectors.1.bias": torch.zeros(1)})))
    assert model.ignored == ("projectors.0.weight", "projectors.1.bias")


def test_half_precision_weights_become_single(written: Callable[..., Request]) -> None:
    model = load(written(lambda ema: ema.update({name: value.half() for name, value in ema.items()})))
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}


def test_loading_into_a_model_on_meta_leaves_nothing_there(golden: Path) -> None:
    with torch.device("meta"):
        module = Elit(ElitParams(16, 2, 4, 32, 4, 4, 1000, 4, 1, 1))
    load_weights(module, FAMILY, read_checkpoint(golden / "elit-c.pt"))
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


WRAPPED = {
    "compiled": lambda ema: {f"_orig_mod.{name}": value for name, value in ema.items()},
    "parallel": lambda ema: {f"module.{name}": value for name, value in ema.items()},
    "both": lambda ema: {"ema": {f"module._orig_mod.{name}": value for name, value in ema.items()}},
    "lightning": lambda ema: {"state_dict": {f"model.{name}": value for name, value in ema.items()} | {"loss.weight": torch.ones(3)}},
    "an average beside": lambda ema: {
        "state_dict": {f"ema.{name}": value for name, value in ema.items()} | {f"net.{name}": 0 * value for name, value in ema.items()}
    },
    "ema-pytorch": lambda ema: {"model_ema": {f"ema_model.{name}": value for name, value in ema.items()} | {"step": torch.ones(())}},
    "deepspeed": lambda ema: {"module": dict(ema), "epoch": 3},
    "by its purpose": lambda ema: {"model_state_dict": dict(ema), "optimizer_state_dict": {"state": {}}},
}  # fmt: skip


@pytest.mark.parametrize("form", WRAPPED)
def test_names_that_trainers_put_before_weights_are_taken_off(form: str, golden: Path, tmp_path: Path) -> None:
    torch.save(WRAPPED[form](public(golden)["ema"]), tmp_path / "weights.pt")
    one, two = (load(Request("elit-sit", path, golden / "elit-c.json")) for path in (golden / "elit-c.pt", tmp_path / "weights.pt"))
    ours, theirs = one.module.state_dict(), two.module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_unknown_prefix_is_a_sentence_that_shows_the_keys(golden: Path, tmp_path: Path) -> None:
    torch.save({f"generator.{name}": value for name, value in public(golden)["ema"].items()}, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"is not an ELIT checkpoint: it lacks .* \(.*weights.pt has generator\.\S+, generator"):
        load(Request("elit-sit", tmp_path / "weights.pt", golden / "elit-c.json"))


def test_shards_and_the_short_suffix_hold_the_same_model(golden: Path, tmp_path: Path) -> None:
    weights = {name: value.contiguous().clone() for name, value in public(golden)["ema"].items()}
    save_file(weights, tmp_path / "c.sft")
    shards = tmp_path / "shards"
    shards.mkdir()
    names, places = sorted(weights), {}
    for index, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{index:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, shards / file)
        places |= dict.fromkeys(part, file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    loaded = [load(Request("elit-sit", path, golden / "elit-c.json")) for path in (golden / "elit-c.pt", tmp_path / "c.sft", shards)]
    states = [model.module.state_dict() for model in loaded]
    assert all(torch.equal(states[0][name], state[name]) for state in states[1:] for name in state)
    assert len({model.checkpoint_sha256 for model in loaded}) == 3
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks model-00002-of-00002.safetensors"):
        load(Request("elit-sit", shards, golden / "elit-c.json"))


@dataclasses.dataclass
class _Hnet:
    num_heads: list[int] = dataclasses.field(default_factory=lambda: [2, 4])
    dechunk_kernel_sigma: float = 0.75


@dataclasses.dataclass
class _Model:
    hnet: _Hnet = dataclasses.field(default_factory=_Hnet)
    name: str = "DC-DiT"


@dataclasses.dataclass
class _Config:
    model: _Model = dataclasses.field(default_factory=_Model)


def elsewhere(value: Any, path: Path, zipped: bool = True) -> None:
    """Save `value` as a trainer whose classes are not here."""
    classes = (_Hnet, _Model, _Config)
    module = types.ModuleType("config")
    names = {kind: (kind.__module__, kind.__qualname__) for kind in classes}
    sys.modules["config"] = module
    try:
        for kind in classes:
            kind.__module__, kind.__qualname__ = "config", kind.__name__
            setattr(module, kind.__name__, kind)
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
    finally:
        del sys.modules["config"]
        for kind, (where, name) in names.items():
            kind.__module__, kind.__qualname__ = where, name


@pytest.mark.parametrize("zipped", [True, False])
def test_a_trainers_dataclasses_are_read_as_data(zipped: bool, golden: Path, tmp_path: Path) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(golden / "dcdit-a.pt", weights_only=True)
    kept = {"ema": content["ema"], "model": content["model"], "opt": {"state": {}, "param_groups": []}, "config": _Config()}
    elsewhere(kept, tmp_path / "0010000.pt", zipped)
    checkpoint = read_checkpoint(tmp_path / "0010000.pt")
    assert checkpoint.args == {"model": {"hnet": {"num_heads": [2, 4], "dechunk_kernel_sigma": 0.75}, "name": "DC-DiT"}}
    assert all(torch.equal(value, content["ema"][name]) for name, value in checkpoint.weights.items())
    params = load(Request("dc-dit", tmp_path / "0010000.pt")).params
    assert (params.num_heads, params.dechunk_kernel_sigma) == (4, 0.75)


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_paths_and_generators_in_args_are_read_as_data(zipped: bool, golden: Path, tmp_path: Path) -> None:
    args = public(golden)["args"] if isinstance(public(golden)["args"], dict) else vars(public(golden)["args"])
    more = {"lr": np.float64(0.25), "seed": np.int64(7), "on": np.bool_(True), "out": Path("/data/run"), "half": np.float16(0.5)}
    rest = {"numpy": np.random.get_state(), "python": random.getstate(), "torch": torch.get_rng_state(), "old": np.random.RandomState(0)}
    content = {"ema": public(golden)["ema"], "args": argparse.Namespace(**args, **more), "rng": rest, "loss": np.arange(3.0)}
    torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "c.pt")
    assert {name: read.args[name] for name in more} == {"lr": 0.25, "seed": 7, "on": True, "out": "/data/run", "half": 0.5}
    assert read.args["encoder_depth"] == 1


@pytest.mark.parametrize("function", ["posix.system", "builtins.eval", "subprocess.check_output", "trainer.run"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_function_that_a_file_calls_is_refused_by_name(function: str, zipped: bool, tmp_path: Path) -> None:
    target = tmp_path / "it-ran"
    module, _, name = function.rpartition(".")
    pickled = b"\x80\x02}q\x00X\x03\x00\x00\x00emac" + f"{module}\n{name}\n".encode()
    pickled += b"X" + len(f"touch {target}").to_bytes(4, "little") + f"touch {target}".encode() + b"\x85Rs."
    path = tmp_path / "evil.pt"
    if zipped:
        torch.save({"ema": {}}, path)
        with zipfile.ZipFile(path) as old:
            entries = {info.filename: old.read(info) for info in old.infolist()}
        with zipfile.ZipFile(path, "w") as new:
            for entry, content in entries.items():
                new.writestr(entry, pickled if entry.endswith("data.pkl") else content)
    else:
        path.write_bytes(pickled)
    with pytest.raises(ModelError, match=r"evil\.pt was refused: it holds|is not a readable PyTorch checkpoint"):
        read_checkpoint(path)
    assert not target.exists()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda ema, raw: {"model": raw, "ema_state_dict": ema},
        lambda ema, raw: {"state_dict": raw, "state_dict_ema": ema},
        lambda ema, raw: {"state_dict": {f"net.{n}": v for n, v in raw.items()} | {f"net_ema.{n}": v for n, v in ema.items()}},
        lambda ema, raw: {f"model.{n}": v for n, v in raw.items()} | {f"model_ema.{n}": v for n, v in ema.items()},
    ],
)
def test_an_average_by_any_name_comes_before_the_last_state(wrap: Callable[[Any, Any], Any], golden: Path, tmp_path: Path) -> None:
    ema = public(golden)["ema"]
    torch.save(wrap(ema, {name: 0 * value for name, value in ema.items()}), tmp_path / "weights.pt")
    weights = read_checkpoint(tmp_path / "weights.pt").weights
    assert all(torch.equal(weights[name], value) for name, value in ema.items())


@pytest.mark.parametrize(
    "content",
    [
        {"module.a": torch.ones(1), "a": torch.zeros(1)},
        {"ema.model.a": torch.ones(1), "ema.module.a": torch.zeros(1)},
        {"ema": {"a": torch.ones(1)}, "ema_slow": {"a": torch.zeros(1)}},
    ],
)
def test_two_weights_of_one_name_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"save the (weights|one) that (are|is) meant"):
        read_checkpoint(tmp_path / "weights.pt")


def test_args_of_any_kind_are_no_traceback(tmp_path: Path) -> None:
    torch.save({"ema": {"a": torch.ones(1)}, "args": torch.ones(3)}, tmp_path / "weights.pt")
    assert read_checkpoint(tmp_path / "weights.pt").args == {}
    endless: dict[str, Any] = {}
    endless["self"] = endless
    torch.save({"ema": {"a": torch.ones(1)}, "args": endless}, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="its args hold themselves"):
        read_checkpoint(tmp_path / "weights.pt")
