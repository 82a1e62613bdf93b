"""ELIT put into plain checkpoints: what the outputs are at first, that training reaches the new weights, and what is refused."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the zoo needs torch")
pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("transformers", reason="the folders' encoders are transformers'")

from safetensors.torch import load_file  # noqa: E402

from elastic_export import elasticize  # noqa: E402
from elastic_export.capture.folders import capture_folder  # noqa: E402
from elastic_export.capture.zoo import Request, load  # noqa: E402
from elastic_export.families.elit import interface, sit  # noqa: E402
from elastic_export.families.elit.backbone import ElitParams  # noqa: E402
from elastic_export.families.hdit.model import Hdit  # noqa: E402
from elastic_export.families.layers import randomize, unpatchify  # noqa: E402
from elastic_export.foreign.checkpoint import read_checkpoint  # noqa: E402
from elastic_export.sides import Sides  # noqa: E402
from elastic_runtime import ModelError, Span, UsageError  # noqa: E402

SIT = ElitParams(
    input_size=8, patch_size=2, in_channels=2, hidden_size=16, depth=5, num_heads=2,
    num_classes=3, group_size=2, head_blocks=1, tail_blocks=1, latent_positions=16,
)  # fmt: skip
SPLIT = {"group_size": 2, "head_blocks": 1, "tail_blocks": 1}
Write = Callable[..., Path]


def random_sit() -> sit.Elit:
    torch.manual_seed(0)  # for what `randomize` adds to
    model = sit.Elit(SIT)
    randomize(model, seed=0)
    return model


@pytest.fixture
def plain(tmp_path: Path) -> Write:
    """A plain SiT's checkpoint, of random weights that leave no layer out; `learned` has its variance too."""

    def write(learned: bool = False, **args: Any) -> Path:
        weights = {name: value for name, value in random_sit().state_dict().items() if not name.startswith(("read.", "write."))}
        if learned:
            for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
                halves = weights[name].unflatten(0, (4, 1, 2))
                weights[name] = torch.cat([halves, torch.randn_like(halves)], dim=1).flatten(0, 2)
        weights = {name.replace("modulation.linear", "adaLN_modulation.1"): value for name, value in weights.items()}
        torch.save({"ema": weights, "args": args}, tmp_path / "plain.pt")
        (tmp_path / "plain.json").write_text(json.dumps({"num_heads": 2}))
        return tmp_path / "plain.pt"

    return write


def made(path: Path, output: Path, **how: Any) -> Any:
    """What becomes of a checkpoint, loaded by the two files alone."""
    elasticize(path, output=output, **SPLIT | {"config": path.with_suffix(".json")} | how)
    name = json.loads(output.with_suffix(".json").read_text())["family"]
    return load(Request(name, output, output.with_suffix(".json")))


def inputs(model: Any, latents: int) -> dict[str, Any]:
    arrays = model.family.feeds(model.params, {"latents": latents}, 2)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def passes_tokens_on(module: Any, given: dict[str, Any]) -> bool:
    """Whether Write gives the very tokens that Read takes."""
    seen: list[Any] = []
    hooks = [
        module.read.register_forward_hook(lambda _, args, out: seen.append(args[0])),
        module.write.register_forward_hook(lambda _, args, out: seen.append(out)),
    ]
    with torch.inference_mode():
        module(**given)
    for hook in hooks:
        hook.remove()
    before, after = seen
    return bool(torch.equal(before, after))


def without_core(sample: Any, time: Any, label: Any) -> Any:
    """The plain SiT with its first and last block alone, by the words of its own direction."""
    whole = random_sit()
    c = whole.t_embedder(time) + whole.y_embedder(label)
    x = whole.x_embedder(sample) + whole.pos_embed
    for index in (0, 4):
        x = whole.blocks[index](x, c)
    return unpatchify(whole.final_layer(x, c), 2, 4)


OWN = {"path_type": "Linear", "prediction": "velocity"}  # SiT's code: x_t = t picture + (1 - t) noise, and picture - noise is predicted
REPA = {"path_type": "linear", "prediction": "v"}  # x_t = (1 - t) picture + t noise, and noise - picture


@pytest.mark.parametrize("family", ["elit-sit", "elit-uvit"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("args", [OWN, REPA])
def test_a_sit_becomes_itself_without_its_core_at_every_budget(
    plain: Write, tmp_path: Path, family: str, learned: bool, args: dict[str, str]
) -> None:
    model = made(plain(learned, **args), tmp_path / "elit.safetensors", family=family)
    assert model.family.name == family
    for latents in (4, 12, 16):
        given = inputs(model, latents)
        assert passes_tokens_on(model.module, given)
        sample, time, label = (given[name] for name in ("sample", "timestep", "class_labels"))
        with torch.inference_mode():
            wanted = -without_core(sample, 1 - time, label) if args is OWN else without_core(sample, time, label)
            np.testing.assert_allclose(model.module(**given), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("learned", "args", "config", "own"),
    [
        (True, {}, {}, True),
        (True, {"prediction": "v"}, {}, False),
        (False, {"path_type": "Linear"}, {}, True),
        (False, {}, {"prediction": "velocity"}, True),
        (False, {}, {"prediction": "v"}, False),
        (False, {"projectors": True}, {}, False),
    ],
)
def test_a_sits_direction_is_told(
    plain: Write, tmp_path: Path, learned: bool, args: dict[str, Any], config: dict[str, str], own: bool
) -> None:
    path = plain(learned, **args)
    if "projectors" in args:
        content = torch.load(path)
        torch.save(content["ema"] | {"projectors.0.0.weight": torch.ones(2)}, path)
    path.with_suffix(".json").write_text(json.dumps({"num_heads": 2} | config))
    model = made(path, tmp_path / "elit.safetensors")
    given = inputs(model, 4)
    with torch.inference_mode():
        times = given["timestep"]
        wanted = without_core(given["sample"], 1 - times if own else times, given["class_labels"])
        np.testing.assert_allclose(model.module(**given), -wanted if own else wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("args", "config", "message"),
    [
        ({}, {}, 'nothing tells which way the time of this SiT goes: write "prediction" in its config'),
        ({}, {"prediction": "noise"}, "a config's prediction is 'velocity' .* got 'noise'"),
        (OWN, {"prediction": "v"}, "is 'v' by its config's prediction and 'velocity' by its args' prediction and 'Linear' by"),
        ({"prediction": "noise"}, {}, "was trained with prediction='noise'"),
        ({"path_type": "GVP"}, {}, "was trained with path_type='GVP'"),
    ],
)
def test_a_direction_that_is_not_told_is_named(
    plain: Write, tmp_path: Path, args: dict[str, Any], config: dict[str, str], message: str
) -> None:
    path = plain(**args)
    path.with_suffix(".json").write_text(json.dumps({"num_heads": 2} | config))
    with pytest.raises(ModelError, match=message):
        elasticize(path, output=tmp_path / "e.safetensors", config=path.with_suffix(".json"), **SPLIT)


def test_a_u_vit_and_an_hdit_keep_their_tokens(backbone: Any, tmp_path: Path) -> None:
    for name, group in (("uvit-a", 4), ("hdit-a", 2)):
        golden = backbone(name)
        output = tmp_path / f"{name}.safetensors"
        model = made(golden.checkpoint, output, config=golden.config, group_size=group, **({"tail_blocks": 0} if "hdit" in name else {}))
        assert model.family.name == {"uvit-a": "elit-uvit-tokens", "hdit-a": "elit-hdit-levels"}[name]
        kept, written = read_checkpoint(golden.checkpoint).weights, load_file(output)
        assert all(torch.equal(written[key], value) for key, value in kept.items() if key in written)
        if name == "uvit-a":
            assert model.params.latent_positions == model.params.windows.tokens
        for latents in (model.params.windows.count, model.params.windows.tokens):
            given = inputs(model, latents)
            assert passes_tokens_on(model.module, given)
        if name == "hdit-a":
            short = model.module.hdit
            assert isinstance(short, Hdit)
            level, core = list(short.mid_level), model.params.core  # type: ignore[arg-type]
            short.mid_level = torch.nn.ModuleList(level[: core.start] + level[core.stop :])
            given.pop("latent_ids")
            whole = load(Request(model.family.name, output, output.with_suffix(".json"))).module
            with torch.inference_mode():
                np.testing.assert_allclose(whole(**inputs(model, latents)), short(**given), atol=2e-6)


def test_qwen_image_keeps_its_tokens(golden: Path, tmp_path: Path) -> None:
    output = elasticize(golden / "qwen-image-a", output=tmp_path / "elit", group_size=4, head_blocks=1, tail_blocks=0)
    graph = capture_folder(output, None, Sides(16, 24), Span(1, 2)).graphs[0]
    for latents in (6, 96):
        given = {name: torch.from_numpy(array) for name, array in graph.feeds(graph.at({"latents": latents, "T": 5}), 2).items()}
        assert passes_tokens_on(graph.module, given)
    (tmp_path / "same").mkdir()
    same = Path(shutil.copytree(golden / "qwen-image-a", tmp_path / "same" / "f"))
    assert elasticize(same, output=same, group_size=4, head_blocks=0, tail_blocks=1) == same
    assert json.loads((same / "transformer" / "elit.json").read_text())["write_kv"] == "all"


def test_training_reaches_the_new_weights(plain: Write, tmp_path: Path) -> None:
    """Write at the first step, Read by what Write then lets through."""
    output = elasticize(plain(**REPA), output=tmp_path / "e.safetensors", config=tmp_path / "plain.json", **SPLIT)
    params = load(Request("elit-sit", output, output.with_suffix(".json"))).params
    module = sit.Elit(params)
    module.load_state_dict({sit.FAMILY.rename_key(key): value for key, value in load_file(output).items()})
    given = {name: torch.from_numpy(array) for name, array in sit.FAMILY.feeds(params, {"latents": 8}, 2).items()}
    optimizer, reached = torch.optim.AdamW(module.parameters(), lr=1e-2), []
    for _ in range(2):
        optimizer.zero_grad()
        module(**given).square().mean().backward()
        parts = {"write": module.write.attention.proj, "read": module.read.modulation.linear, "core": module.blocks[2].mlp.fc1}
        reached.append({name: bool(part.weight.grad.abs().max() > 0) for name, part in parts.items()})
        optimizer.step()
    assert reached == [{"write": True, "read": False, "core": False}, {"write": True, "read": True, "core": True}]


@pytest.mark.parametrize("name", ["a", "uvit-tokens-a", "hdit-levels-a"])
def test_public_keys_come_back(golden: Path, name: str) -> None:
    keys = read_checkpoint(golden / f"elit-{name}.pt").weights
    editors = [key for key in keys if "_token_editor" in key]
    assert len(editors) > 10
    assert [interface.public(interface.renamed(key)) for key in editors] == editors


def test_the_same_seed_gives_the_same_weights(plain: Write, tmp_path: Path) -> None:
    path = plain(**REPA)
    torch.manual_seed(5)
    noise = torch.randn(3)
    torch.manual_seed(5)
    one, two, three = (
        load_file(elasticize(path, output=tmp_path / f"{i}.safetensors", config=path.with_suffix(".json"), seed=seed, **SPLIT))
        for i, seed in enumerate((0, 0, 1))
    )
    key = "input_token_editor.adapters.0.learned_query_embed"
    assert torch.equal(one[key], two[key])
    assert not torch.equal(one[key], three[key])
    assert torch.equal(torch.randn(3), noise), "the caller's own generator is left alone"


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"group_size": 3}, ModelError, "a grid of 4x4 tokens does not divide into groups of 3x3"),
        ({"group_size": 0}, ModelError, "group_size must be at least 1, got 0"),
        ({"group_size": 2.0}, UsageError, "group_size is a whole number, got 2.0"),
        ({"head_blocks": True}, UsageError, "head_blocks is a whole number, got True"),
        ({"head_blocks": 4}, ModelError, r"head_blocks 4 \+ tail_blocks 1 must leave a core in depth 5"),
        ({"head_blocks": 2, "family": "elit-uvit"}, ModelError, "head_blocks 2 must equal tail_blocks 1"),
        ({"family": "elit-hdit"}, UsageError, "is a SiT, which becomes elit-sit or elit-uvit, not elit-hdit"),
        ({"config": None}, ModelError, "elit-sit: nothing tells num_heads"),
    ],
)
def test_what_does_not_fit_is_named(plain: Write, tmp_path: Path, how: dict[str, Any], error: type, message: str) -> None:
    path = plain(**REPA)
    with pytest.raises(error, match=message):
        elasticize(path, output=tmp_path / "e.safetensors", **SPLIT | {"config": path.with_suffix(".json")} | how)
    assert not (tmp_path / "e.safetensors").exists()


def test_outputs_and_checkpoints_that_will_not_do_are_named(plain: Write, golden: Path, tmp_path: Path) -> None:
    path = plain(**REPA)
    options = SPLIT | {"config": path.with_suffix(".json")}
    with pytest.raises(UsageError, match=r"the output of a checkpoint is a .safetensors file, .* got .*e.pt"):
        elasticize(path, output=tmp_path / "e.pt", **options)
    elasticize(path, output=tmp_path / "e.safetensors", **options)
    with pytest.raises(UsageError, match="e.safetensors exists: choose another output"):
        elasticize(path, output=tmp_path / "e.safetensors", **options)
    elasticize(path, output=tmp_path / "e.safetensors", overwrite=True, **options)
    for elastic in (tmp_path / "e.safetensors", golden / "elit-uvit-tokens-a.pt", golden / "elit-hdit-levels-a.pt"):
        with pytest.raises(ModelError, match=r"has an interface \(input_token_editor\) already: export it as it is"):
            elasticize(elastic, output=tmp_path / "f.safetensors", **options)
    with pytest.raises(ModelError, match=r"is no plain checkpoint that ELIT can be put into: there are SiT \(blocks.0"):
        elasticize(golden / "dcdit-a.pt", output=tmp_path / "f.safetensors", **SPLIT)
    torch.save({"ema": {}, "args": {}}, tmp_path / "none.pt")
    with pytest.raises(ModelError, match="holds no weights"):
        elasticize(tmp_path / "none.pt", output=tmp_path / "f.safetensors", **SPLIT)


def test_folders_that_will_not_do_are_named(golden: Path, tmp_path: Path) -> None:
    import folders

    plain = golden / "qwen-image-a"
    with pytest.raises(ModelError, match=r"transformer has ELIT put in already \(elit.json\)"):
        elasticize(golden / "elit-qwen-image-a", output=tmp_path / "a", **SPLIT)
    with pytest.raises(ModelError, match=r"head_blocks 1 \+ tail_blocks 1 must leave a core in 2 blocks"):
        elasticize(plain, output=tmp_path / "a", **SPLIT)
    with pytest.raises(UsageError, match="exists, and a folder is never replaced: give a new one, which becomes a copy, or .* itself"):
        elasticize(plain, output=tmp_path, **SPLIT | {"head_blocks": 0})
    with pytest.raises(UsageError, match="becomes elit-qwen-image: leave family and config out"):
        elasticize(plain, output=tmp_path / "a", family="elit-sit", **SPLIT)
    flux = folders.write(tmp_path / "flux", folders.flux(), decoder=False)
    with pytest.raises(ModelError, match="is a FluxTransformer2DModel; of diffusers folders ELIT is put into QwenImageTransformer2DModel"):
        elasticize(flux, output=tmp_path / "a", **SPLIT)
    assert not (tmp_path / "a").exists()


def test_a_folder_that_was_to_get_two_files_gets_none_when_the_second_fails(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elastic_export import elasticizing

    plain, saved = Path(shutil.copytree(golden / "qwen-image-a", tmp_path / "q")), elasticizing.save_file
    before = sorted(plain.rglob("*"))

    def full(path: Path, content: bytes) -> None:
        if path.name == "elit.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved(path, content)

    monkeypatch.setattr(elasticizing, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        elasticize(plain, output=plain, group_size=4, head_blocks=1, tail_blocks=0)
    assert sorted(plain.rglob("*")) == before
    monkeypatch.undo()
    (plain / "transformer" / "elit.safetensors").write_bytes(b"")  # as a kill leaves it
    with pytest.raises(ModelError, match=r"or delete elit.safetensors where elasticize was killed before it wrote elit.json"):
        elasticize(plain, output=plain, group_size=4, head_blocks=1, tail_blocks=0)


def test_a_copy_that_is_cut_off_leaves_no_folder(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("elastic_export.elasticizing.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        elasticize(golden / "qwen-image-a", output=tmp_path / "elit", group_size=4, head_blocks=1, tail_blocks=0)
    assert list(tmp_path.iterdir()) == []
