"""Each mend is needed: the fault shows without it, and only without it."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import narrow
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop

from elastic_runtime import InferenceError
from elastic_targets.coreml import Evaluator
from elastic_targets.coreml.mends import mended, rewrite, save

OPEN = torch.export.Dim.DYNAMIC
Convert = Callable[..., Callable[..., Any]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' own warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """Convert a module, `without` one mend, and return what runs the saved program. An input of integers has an open length."""

    def make(module: nn.Module, *example: Tensor, without: str | None = None, half: bool = False) -> Callable[..., Any]:
        names = [f"x{i}" for i in range(len(example))]
        lengths = tuple(None if tensor.is_floating_point() else {0: OPEN} for tensor in example)
        inputs = [
            ct.TensorType(name=name, shape=tensor.shape, dtype=np.float32)
            if tensor.is_floating_point()
            else ct.TensorType(name=name, shape=(ct.RangeDim(1, 12),), dtype=np.int32)
            for name, tensor in zip(names, example, strict=True)
        ]
        with quiet(), mended(without=without):
            exported = torch.export.export(module, example, dynamic_shapes=(lengths,) if len(lengths) > 1 else None, strict=False)
            exported = exported.run_decompositions({})
            model = ct.convert(
                exported if without == "rewrite" else rewrite(exported),
                inputs=inputs,
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
                skip_model_load=True,
            )
            package = tmp_path / "mended.mlpackage"
            if without == "save":
                model.save(str(package))
            else:
                save(model, package)
            del model
        evaluator = Evaluator(tmp_path / "mended.mlpackage")

        def run(*tensors: Tensor) -> Any:
            return next(iter(evaluator.run("main", {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}).values()))

        return run

    return make


class TanhGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class FullSlice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, : x.shape[1]].clone() * 2 + x[:, 0:9999]


class Split(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        x, ids = tensors
        head, tail = x.split([ids.shape[0], x.shape[1] - ids.shape[0]], dim=1)
        return torch.cat([tail * 2, head], dim=1)


class Prefix(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        x, ids = tensors
        return torch.cat([x[:, : ids.shape[0]].tanh(), x[:, ids.shape[0] :]], dim=1)


class Loop(nn.Module):
    """Values of equal names, each used twice, inside the loop and around it."""

    def forward(self, x: Tensor) -> Tensor:
        around = x.tanh()

        def body(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            within = (x * 3).tanh()
            return i + 1, within * around + within - around * 2

        return while_loop(lambda i, x: i < 3, body, (torch.zeros((), dtype=torch.int64), x))[1] * around


X = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0)) * 2


def test_gelu_keeps_its_tanh_form(convert: Convert) -> None:
    wanted = F.gelu(X, approximate="tanh").numpy()
    np.testing.assert_allclose(convert(TanhGelu(), X)(X), wanted, atol=1e-6)
    assert np.abs(convert(TanhGelu(), X, without="gelu")(X) - wanted).max() > 1e-4


def test_a_slice_of_everything_converts(convert: Convert) -> None:
    np.testing.assert_allclose(convert(FullSlice(), X)(X), (X * 3).numpy(), atol=1e-6)
    with pytest.raises(NotImplementedError, match="alias"):
        convert(FullSlice(), X, without="alias")


def test_a_split_at_an_open_length_converts(convert: Convert) -> None:
    run = convert(Split(), X, torch.arange(5))
    for length in (3, 5, 11):
        np.testing.assert_allclose(run(X, torch.arange(length)), Split()(X, torch.arange(length)).numpy(), atol=1e-6)
    with pytest.raises(AttributeError, match="has no attribute 'val'"):
        convert(Split(), X, torch.arange(5), without="split_with_sizes")


def test_a_split_of_constant_sizes_converts(convert: Convert) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            head, tail = x.split([5, 7], dim=-2)
            return torch.cat([tail, head], dim=1)

    np.testing.assert_allclose(convert(Fixed(), X)(X), Fixed()(X).numpy())


@pytest.mark.parametrize("half", narrow([False, True]))
def test_an_rms_norm_keeps_its_epsilon(convert: Convert, half: bool) -> None:
    """Of small values, of zeros, and of values whose squares are beyond fp16."""

    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, (3,), torch.tensor([1.0, -2.0, 3.0]), 1e-5)

    x = X * torch.tensor([0, 1e-3, 1e-2, 1, 300, 3000])[:, None].repeat(2, 1)
    wanted = Norm()(x).numpy()
    np.testing.assert_allclose(convert(Norm(), x, half=half)(x), wanted, atol=1e-2 if half else 2e-6)
    assert not np.abs(convert(Norm(), x, without="rms_norm", half=half)(x) - wanted).max() < 0.1


def test_half_of_an_open_length_is_a_whole_number(convert: Convert) -> None:
    class Rows(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            x, ids = tensors
            return x[:1, :1].expand(1, ids.shape[0] // 2 + 1, 3) * 2

    run = convert(Rows(), X, torch.arange(6))
    for length in (1, 5, 12):
        np.testing.assert_allclose(run(X, torch.arange(length)), Rows()(X, torch.arange(length)).numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="should share the same data type"):
        convert(Rows(), X, torch.arange(6), without="floordiv")


def test_an_open_prefix_of_everything_has_no_empty_tail(convert: Convert) -> None:
    ids = torch.arange(5)
    run = convert(Prefix(), X, ids)
    for length in (1, 5, 12):
        np.testing.assert_allclose(run(X, torch.arange(length)), Prefix()(X, torch.arange(length)).numpy(), atol=1e-6)
    with pytest.raises(InferenceError, match="empty tensor"):
        convert(Prefix(), X, ids, without="rewrite")(X, torch.arange(12))


def test_only_a_tail_that_fits_its_head_is_rewritten(convert: Convert) -> None:
    class Longer(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            x, ids = tensors
            return torch.cat([x, x[:, ids.shape[0] :]], dim=1)

    run = convert(Longer(), X, torch.arange(5))
    np.testing.assert_allclose(run(X, torch.arange(7)), Longer()(X, torch.arange(7)).numpy())


@pytest.mark.parametrize("half", narrow([False, True]))
def test_a_loop_converts_and_its_names_are_its_own(convert: Convert, half: bool) -> None:
    around, wanted = X.tanh(), X
    for _ in range(3):
        within = (wanted * 3).tanh()
        wanted = within * around + within - around * 2
    np.testing.assert_allclose(convert(Loop(), X, half=half)(X), (wanted * around).numpy(), atol=1e-2 if half else 1e-6)


def test_a_loop_is_refused_without_each_of_its_mends(convert: Convert) -> None:
    for without, message in (
        ("rewrite", "Only torch.Tensor attr handled"), ("while_loop", "kind while_loop"), ("save", "Multi-block case"),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match=message):
            convert(Loop(), X, without=without)


def test_the_mends_are_lent_and_taken_back() -> None:
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    before = dict(_TORCH_OPS_REGISTRY.name_to_func_mapping)
    with pytest.raises(KeyError), mended():
        assert _TORCH_OPS_REGISTRY.name_to_func_mapping != before
        raise KeyError
    assert _TORCH_OPS_REGISTRY.name_to_func_mapping == before
