"""Each MIL operation of the evaluator against torch or numpy, in a saved program."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb  # noqa: N813  its name everywhere
from coremltools.converters.mil.mil import types

from elastic_runtime import InferenceError

Program = Callable[..., Callable[..., Any]]
RNG = np.random.default_rng(4)
X = RNG.standard_normal((2, 3, 4)).astype(np.float32)
Y = RNG.standard_normal((2, 3, 4)).astype(np.float32)
PICTURE = RNG.standard_normal((1, 4, 6, 5)).astype(np.float32)
T = torch.from_numpy

UNARY: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "abs": (lambda x: mb.abs(x=x), torch.abs),
    "ceil": (lambda x: mb.ceil(x=x), torch.ceil),
    "clip": (lambda x: mb.clip(x=x, alpha=-0.5, beta=0.25), lambda x: x.clamp(-0.5, 0.25)),
    "cos": (lambda x: mb.cos(x=x), torch.cos),
    "cumsum": (lambda x: mb.cumsum(x=x, axis=1, exclusive=True, reverse=True), lambda x: x.flip(1).cumsum(1).flip(1) - x),
    "erf": (lambda x: mb.erf(x=x), torch.erf),
    "exp": (lambda x: mb.exp(x=x), torch.exp),
    "exp2": (lambda x: mb.exp2(x=x), torch.exp2),
    "expand_dims": (lambda x: mb.expand_dims(x=x, axes=[1, -1]), lambda x: x[:, None, ..., None]),
    "floor": (lambda x: mb.floor(x=x), torch.floor),
    "gelu": (lambda x: mb.gelu(x=x, mode="EXACT"), F.gelu),
    "gelu tanh": (lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), lambda x: F.gelu(x, approximate="tanh")),
    "gelu sigmoid": (lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), lambda x: x * torch.sigmoid(1.702 * x)),
    "inverse": (lambda x: mb.inverse(x=x, epsilon=1e-3), lambda x: 1 / (x + 1e-3)),
    "layer_norm": (lambda x: mb.layer_norm(x=x, axes=[-1], epsilon=1e-6), lambda x: F.layer_norm(x, (4,), eps=1e-6)),
    "leaky_relu": (lambda x: mb.leaky_relu(x=x, alpha=0.1), lambda x: F.leaky_relu(x, 0.1)),
    "log": (lambda x: mb.log(x=mb.square(x=x), epsilon=1e-6), lambda x: (x * x + 1e-6).log()),
    "pad": (lambda x: mb.pad(x=x, pad=[1, 2, 0, 3], mode="constant", constant_val=7.0), lambda x: F.pad(x, (0, 3, 1, 2), value=7.0)),
    "pad reflect": (lambda x: mb.pad(x=x, pad=[0, 0, 0, 0, 1, 2], mode="reflect"), lambda x: F.pad(x, (1, 2), mode="reflect")),
    "reduce_argmax": (lambda x: mb.reduce_argmax(x=x, axis=1), lambda x: x.argmax(1)),
    "reduce_argmin": (lambda x: mb.reduce_argmin(x=x, axis=-1, keep_dims=True), lambda x: x.argmin(-1, keepdim=True)),
    "reduce_l2_norm": (lambda x: mb.reduce_l2_norm(x=x, axes=[-1], keep_dims=True), lambda x: x.norm(dim=-1, keepdim=True)),
    "reduce_max": (lambda x: mb.reduce_max(x=x, axes=[0, 2]), lambda x: x.amax((0, 2))),
    "reduce_mean": (lambda x: mb.reduce_mean(x=x, axes=[1]), lambda x: x.mean(1)),
    "reduce_min": (lambda x: mb.reduce_min(x=x, axes=[1]), lambda x: x.amin(1)),
    "reduce_prod": (lambda x: mb.reduce_prod(x=x, axes=[0, 1]), lambda x: x.prod(1).prod(0)),
    "reduce_sum": (lambda x: mb.reduce_sum(x=x, axes=[0, 1]), lambda x: x.sum((0, 1))),
    "reduce_sum_square": (lambda x: mb.reduce_sum_square(x=x, axes=[2]), lambda x: x.square().sum(2)),
    "relu": (lambda x: mb.relu(x=x), torch.relu),
    "reshape": (lambda x: mb.reshape(x=x, shape=[4, -1]), lambda x: x.reshape(4, -1)),
    "reverse": (lambda x: mb.reverse(x=x, axes=[1]), lambda x: x.flip(1)),
    "round": (lambda x: mb.round(x=x), torch.round),
    "rsqrt": (lambda x: mb.rsqrt(x=mb.square(x=x), epsilon=1e-6), lambda x: (x * x + 1e-6).rsqrt()),
    "sigmoid": (lambda x: mb.sigmoid(x=x), torch.sigmoid),
    "sign": (lambda x: mb.sign(x=x), torch.sign),
    "silu": (lambda x: mb.silu(x=x), F.silu),
    "sin": (lambda x: mb.sin(x=x), torch.sin),
    "slice_by_index": (lambda x: mb.slice_by_index(x=x, begin=[0, 2, 1], end=[0, 0, 4], stride=[1, -1, 2], end_mask=[True, False, False]),
                       lambda x: x[:, 1:3, 1:4:2].flip(1)),
    "slice_by_index squeezed": (lambda x: mb.slice_by_index(x=x, begin=[-1, 0, 0], end=[0, 2, 0], squeeze_mask=[True, False, False],
                                                            end_mask=[False, False, True]), lambda x: x[-1, 0:2]),
    "slice_by_size": (lambda x: mb.slice_by_size(x=x, begin=[0, 1, 0], size=[2, 2, -1]), lambda x: x[:, 1:3]),
    "softmax": (lambda x: mb.softmax(x=x, axis=1), lambda x: x.softmax(1)),
    "softplus": (lambda x: mb.softplus(x=x), F.softplus),
    "split": (lambda x: mb.split(x=x, split_sizes=[1, 3], axis=-1)[1], lambda x: x[..., 1:]),
    "split evenly": (lambda x: mb.split(x=x, num_splits=2, axis=-1)[0], lambda x: x[..., :2]),
    "sqrt": (lambda x: mb.sqrt(x=mb.abs(x=x)), lambda x: x.abs().sqrt()),
    "squeeze": (lambda x: mb.squeeze(x=mb.reshape(x=x, shape=[1, 24, 1]), axes=[0]), lambda x: x.reshape(24, 1)),
    "tanh": (lambda x: mb.tanh(x=x), torch.tanh),
    "tile": (lambda x: mb.tile(x=x, reps=[1, 2, 3]), lambda x: x.repeat(1, 2, 3)),
    "topk": (lambda x: mb.topk(x=x, k=2, axis=-1, ascending=True)[1], lambda x: x.argsort(-1)[..., :2]),
    "argsort": (lambda x: mb.argsort(x=x, axis=1, ascending=True), lambda x: x.argsort(1)),
    "transpose": (lambda x: mb.transpose(x=x, perm=[2, 0, 1]), lambda x: x.permute(2, 0, 1)),
    "band_part": (lambda x: mb.band_part(x=x, lower=0, upper=1), lambda x: torch.triu(x) - torch.triu(x, 2)),
    "stack": (lambda x: mb.stack(values=[x, mb.exp(x=x)], axis=1), lambda x: torch.stack([x, x.exp()], 1)),
    "shape": (lambda x: mb.cast(x=mb.shape(x=x), dtype="fp32"), lambda x: torch.tensor(x.shape).float()),
    "fill_like": (lambda x: mb.fill_like(ref_tensor=x, value=2.5), lambda x: torch.full_like(x, 2.5)),
}  # fmt: skip
BINARY: dict[str, Callable[..., Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "real_div": torch.true_divide, "floor_div": torch.floor_divide,
    "mod": torch.remainder, "maximum": torch.maximum, "minimum": torch.minimum,
}  # fmt: skip
COMPARISONS: dict[str, Callable[..., Any]] = {
    "greater": torch.gt, "greater_equal": torch.ge, "less": torch.lt, "less_equal": torch.le, "equal": torch.eq, "not_equal": torch.ne,
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_one_input(program: Program, name: str) -> None:
    body, wanted = UNARY[name]
    np.testing.assert_allclose(program(body, x=X.shape)(x=X), wanted(T(X)).numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BINARY)
def test_two_inputs_broadcast(program: Program, name: str) -> None:
    run = program(lambda x, y: getattr(mb, name)(x=x, y=y), x=X.shape, y=(3, 1))
    np.testing.assert_allclose(run(x=X, y=Y[0, :, :1]), BINARY[name](T(X), T(Y[0, :, :1])).numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_choose(program: Program, name: str) -> None:
    run = program(lambda x, y: mb.select(cond=getattr(mb, name)(x=x, y=y), a=x, b=y), x=X.shape, y=X.shape)
    np.testing.assert_array_equal(run(x=X, y=Y), torch.where(COMPARISONS[name](T(X), T(Y)), T(X), T(Y)).numpy())


def test_logic(program: Program) -> None:
    def body(x: Any, y: Any) -> Any:
        a, b = mb.greater(x=x, y=0.0), mb.greater(x=y, y=0.0)
        return mb.cast(x=mb.logical_or(x=mb.logical_and(x=a, y=b), y=mb.logical_not(x=mb.logical_xor(x=a, y=b))), dtype="fp32")

    a, b = X > 0, Y > 0
    np.testing.assert_array_equal(program(body, x=X.shape, y=X.shape)(x=X, y=Y), ((a & b) | ~(a ^ b)).astype(np.float32))


@pytest.mark.parametrize("masked", [False, True])
def test_attention(program: Program, masked: bool) -> None:
    q, k, v = (RNG.standard_normal((2, 3, n, 8)).astype(np.float32) for n in (4, 6, 6))
    mask = RNG.standard_normal((4, 6)).astype(np.float32)
    shapes = {"q": q.shape, "k": k.shape, "v": v.shape} | ({"m": mask.shape} if masked else {})
    feeds = {"q": q, "k": k, "v": v} | ({"m": mask} if masked else {})
    run = program(
        lambda q, k, v, *m: mb.scaled_dot_product_attention(query=q, key=k, value=v, **({"attn_mask": m[0]} if m else {})), **shapes
    )
    wanted = F.scaled_dot_product_attention(T(q), T(k), T(v), attn_mask=T(mask) if masked else None)
    np.testing.assert_allclose(run(**feeds), wanted.numpy(), atol=1e-6)


def test_products(program: Program) -> None:
    run = program(lambda x, y: mb.matmul(x=x, y=y, transpose_y=True), x=X.shape, y=Y.shape)
    np.testing.assert_allclose(run(x=X, y=Y), X @ Y.transpose(0, 2, 1), atol=1e-6)
    y = RNG.standard_normal((4, 3, 5)).astype(np.float32)
    run = program(lambda x, y: mb.einsum(values=(x, y), equation="chw,whr->chr"), x=X.shape, y=y.shape)
    np.testing.assert_allclose(run(x=X, y=y), np.einsum("chw,whr->chr", X, y), atol=1e-6)


def test_bytes_are_rounded_to_even_and_saturate(program: Program) -> None:
    def pair(x: Any, **how: Any) -> Any:
        codes = mb.quantize(input=x, output_dtype="uint8" if "zero_point" in how else "int8", **how)
        return mb.dequantize(input=codes, **how)

    x = np.array([[-65.0, -64.0, -1.25, -0.75, -0.25, 0.0], [0.25, 0.75, 1.25, 1.4, 63.5, 64.0]], np.float32)
    codes = np.array([[-128, -128, -2, -2, 0, 0], [0, 2, 2, 3, 127, 127]])
    np.testing.assert_array_equal(program(lambda x: pair(x, scale=np.float32(0.5)), x=x.shape)(x=x), codes * 0.5)
    zeros, scales = np.array([0, 130], np.uint8), np.array([0.5, 0.25], np.float32)
    codes = np.array([[0, 0, 0, 0, 0, 0], [1, 3, 5, 6, 125, 125]])  # the second row's zero is at 130, and 255 is the end
    run = program(lambda x: pair(x, scale=scales, zero_point=zeros, axis=0), x=x.shape)
    np.testing.assert_array_equal(run(x=x), codes * scales[:, None])


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"pad_type": "custom", "pad": [1, 1, 2, 0], "strides": [2, 1]}, lambda x, w: F.conv2d(F.pad(x, (2, 0, 1, 1)), w, stride=(2, 1))),
        ({"pad_type": "valid", "dilations": [2, 1]}, lambda x, w: F.conv2d(x, w, dilation=(2, 1))),
        ({"pad_type": "same"}, lambda x, w: F.conv2d(x, w, padding=1)),
    ],
)
def test_convolutions(program: Program, settings: dict[str, Any], wanted: Callable[..., Any]) -> None:
    weight = RNG.standard_normal((3, 4, 3, 3)).astype(np.float32)
    run = program(lambda x: mb.conv(x=x, weight=weight, **settings), x=PICTURE.shape)
    np.testing.assert_allclose(run(x=PICTURE), wanted(T(PICTURE), T(weight)).numpy(), atol=1e-5)


def test_transposed_and_grouped_convolutions(program: Program) -> None:
    weight = RNG.standard_normal((4, 2, 3, 3)).astype(np.float32)
    run = program(
        lambda x: mb.conv_transpose(x=x, weight=weight, strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1], groups=2), x=PICTURE.shape
    )
    np.testing.assert_allclose(run(x=PICTURE), F.conv_transpose2d(T(PICTURE), T(weight), stride=2, padding=1, groups=2).numpy(), atol=1e-5)
    weight = RNG.standard_normal((4, 1, 3, 3)).astype(np.float32)
    run = program(lambda x: mb.conv(x=x, weight=weight, groups=4, pad_type="valid"), x=PICTURE.shape)
    np.testing.assert_allclose(run(x=PICTURE), F.conv2d(T(PICTURE), T(weight), groups=4).numpy(), atol=1e-5)


def test_what_a_vae_decoder_is_made_of(program: Program) -> None:
    """Group norm in pieces, SiLU, doubling by nearest neighbour, a convolution, and pixel shuffling."""
    weight = RNG.standard_normal((4, 4, 3, 3)).astype(np.float32)

    def body(x: Any) -> Any:
        grouped = mb.reshape(x=x, shape=[1, 2, 2 * 6 * 5])
        mean = mb.reduce_mean(x=grouped, axes=[-1], keep_dims=True)
        centred = mb.sub(x=grouped, y=mean)
        deviation = mb.sqrt(x=mb.add(x=mb.reduce_mean(x=mb.square(x=centred), axes=[-1], keep_dims=True), y=1e-6))
        normal = mb.silu(x=mb.reshape(x=mb.real_div(x=centred, y=deviation), shape=[1, 4, 6, 5]))
        doubled = mb.upsample_nearest_neighbor(x=normal, scale_factor_height=2, scale_factor_width=2)
        return mb.pixel_shuffle(x=mb.conv(x=doubled, weight=weight, pad_type="custom", pad=[1, 1, 1, 1]), upscale_factor=2)

    normal = F.silu(F.group_norm(T(PICTURE), 2, eps=1e-6))
    wanted = F.pixel_shuffle(F.conv2d(F.interpolate(normal, scale_factor=2.0, mode="nearest"), T(weight), padding=1), 2)
    np.testing.assert_allclose(program(body, x=PICTURE.shape)(x=PICTURE), wanted.numpy(), atol=2e-5)


def test_packing_as_a_vae_encoder_does(program: Program) -> None:
    run = program(lambda x: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)), x=(1, 4, 6, 4))
    np.testing.assert_array_equal(run(x=PICTURE[..., :4]), F.pixel_unshuffle(T(PICTURE[..., :4]), 2).numpy())


def test_normalisation_by_stored_and_by_own_moments(program: Program) -> None:
    mean, variance = PICTURE.mean((0, 2, 3)), PICTURE.var((0, 2, 3))
    run = program(lambda x: mb.batch_norm(x=x, mean=mean, variance=variance, epsilon=1e-5), x=PICTURE.shape)
    np.testing.assert_allclose(run(x=PICTURE), F.batch_norm(T(PICTURE), T(mean), T(variance), eps=1e-5).numpy(), atol=1e-5)
    run = program(lambda x: mb.instance_norm(x=x, epsilon=1e-5), x=PICTURE.shape)
    np.testing.assert_allclose(run(x=PICTURE), F.instance_norm(T(PICTURE), eps=1e-5).numpy(), atol=1e-5)


def test_bilinear_upsampling(program: Program) -> None:
    run = program(
        lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2.0, scale_factor_width=2.0, align_corners=False), x=PICTURE.shape
    )
    np.testing.assert_allclose(run(x=PICTURE), F.interpolate(T(PICTURE), scale_factor=2.0, mode="bilinear").numpy(), atol=1e-5)


def test_gathering(program: Program) -> None:
    picks = np.array([2, 0, 1, 1], dtype=np.int32)
    run = program(lambda x, i: mb.gather(x=x, indices=i, axis=1), x=X.shape, i=(4,))
    np.testing.assert_array_equal(run(x=X, i=picks), X[:, picks])
    along = RNG.integers(0, 3, (2, 5, 4)).astype(np.int32)
    run = program(lambda x, i: mb.gather_along_axis(x=x, indices=i, axis=1), x=X.shape, i=along.shape)
    np.testing.assert_array_equal(run(x=X, i=along), np.take_along_axis(X, along, 1))
    each = np.array([[2, 0], [1, 1]], dtype=np.int32)
    run = program(lambda x, i: mb.gather(x=x, indices=i, axis=1, batch_dims=1), x=X.shape, i=each.shape)
    np.testing.assert_array_equal(run(x=X, i=each), np.stack([X[0, each[0]], X[1, each[1]]]))
    points = np.array([[1, 2], [0, 0]], dtype=np.int32)
    run = program(lambda x, i: mb.gather_nd(x=x, indices=i), x=X.shape, i=points.shape)
    np.testing.assert_array_equal(run(x=X, i=points), X[points[:, 0], points[:, 1]])


def test_scattering(program: Program) -> None:
    picks, rows = np.array([2, 0], dtype=np.int32), Y[:, :2]
    run = program(lambda x, i, u: mb.scatter(data=x, indices=i, updates=u, axis=1, mode="update"), x=X.shape, i=(2,), u=rows.shape)
    wanted = X.copy()
    wanted[:, picks] = rows
    np.testing.assert_array_equal(run(x=X, i=picks, u=rows), wanted)
    along = np.array([[[0, 1, 2, 0]], [[2, 2, 0, 1]]], dtype=np.int32)
    run = program(
        lambda x, i, u: mb.scatter_along_axis(data=x, indices=i, updates=u, axis=1, mode="add"), x=X.shape, i=along.shape, u=(2, 1, 4)
    )
    np.testing.assert_allclose(run(x=X, i=along, u=Y[:, :1]), T(X).scatter_add(1, T(along).long(), T(Y[:, :1])).numpy(), atol=1e-6)
    points = np.array([[1, 2], [0, 0]], dtype=np.int32)
    run = program(lambda x, i, u: mb.scatter_nd(data=x, indices=i, updates=u, mode="update"), x=X.shape, i=points.shape, u=(2, 4))
    wanted = X.copy()
    wanted[points[:, 0], points[:, 1]] = Y[0, :2]
    np.testing.assert_array_equal(run(x=X, i=points, u=Y[0, :2]), wanted)
    run = program(lambda x, u: mb.slice_update(x=x, update=u, begin=[0, 1, 0], end=[2, 3, 4]), x=X.shape, u=(2, 2, 4))
    wanted = X.copy()
    wanted[:, 1:3] = Y[:, :2]
    np.testing.assert_array_equal(run(x=X, u=Y[:, :2]), wanted)


def test_counting(program: Program) -> None:
    def body(i: Any) -> Any:
        end = mb.squeeze(x=i, axes=[0])
        return mb.cast(x=mb.range_1d(end=end, start=1, step=2), dtype="fp32")

    np.testing.assert_array_equal(program(body, i=(1,))(i=np.array([8], dtype=np.int32)), [1, 3, 5, 7])
    run = program(lambda i: mb.one_hot(indices=i, one_hot_vector_size=4, on_value=2.0, off_value=-1.0), i=(3,))
    np.testing.assert_array_equal(run(i=np.array([3, 0, 1], dtype=np.int32)), np.eye(4)[[3, 0, 1]] * 3 - 1)


def test_a_loop_runs_as_often_as_its_value_says(program: Program) -> None:
    def body(x: Any, i: Any) -> Any:
        count = mb.squeeze(x=i, axes=[0])
        _, result = mb.while_loop(
            _cond=lambda k, y: mb.less(x=k, y=count),
            _body=lambda k, y: (mb.add(x=k, y=1), mb.tanh(x=mb.mul(x=y, y=1.5))),
            loop_vars=(0, x),
        )
        return result

    run = program(body, x=(2, 3), i=(1,))
    for loops in (0, 1, 5):
        wanted = X[:, :, 0]
        for _ in range(loops):
            wanted = np.tanh(wanted * np.float32(1.5))
        np.testing.assert_allclose(run(x=X[:, :, 0], i=np.array([loops], dtype=np.int32)), wanted, atol=1e-6)


def test_a_branch_is_chosen_by_value(program: Program) -> None:
    def body(x: Any) -> Any:
        positive = mb.greater(x=mb.reduce_sum(x=x, axes=[0]), y=0.0)
        return mb.cond(pred=positive, _true_fn=lambda: mb.exp(x=x), _false_fn=lambda: mb.mul(x=x, y=2.0))

    run = program(body, x=(3,))
    np.testing.assert_allclose(run(x=np.float32([1, 2, 3])), np.exp([1, 2, 3]), rtol=1e-6)
    np.testing.assert_allclose(run(x=np.float32([-1, -2, -3])), [-2, -4, -6])


def test_fp16_is_rounded_after_each_operation(program: Program) -> None:
    def body(x: Any) -> Any:
        half = mb.cast(x=x, dtype="fp16")
        return mb.cast(x=mb.sub(x=mb.add(x=half, y=np.float16(2048)), y=np.float16(2048)), dtype="fp32")

    assert program(body, x=(2,))(x=np.float32([0.7, 3.3])).tolist() == [0.0, 4.0]  # float16 counts in twos from 2048


def test_fp16_overflows_as_on_the_device(program: Program) -> None:
    def body(x: Any) -> Any:
        half = mb.cast(x=x, dtype="fp16")
        return mb.cast(x=mb.mul(x=half, y=half), dtype="fp32")

    assert np.isinf(program(body, x=(1,))(x=np.float32([300.0]))[0])


@pytest.mark.parametrize(
    ("body", "inputs", "feeds", "message"),
    [
        (lambda x: mb.atan(x=x), {"x": (3,)}, {"x": np.zeros(3, np.float32)}, "no operation 'atan', which function 'main' uses"),
        (lambda x, i: mb.gather(x=x, indices=i), {"x": (3,), "i": (1,)},
         {"x": np.zeros(3, np.float32), "i": np.array([3], np.int32)}, "index 3 to 3 outside 0 to 2"),
        (lambda x, i: mb.slice_by_index(x=x, begin=i, end=[3]), {"x": (3,), "i": (1,)},
         {"x": np.zeros(3, np.float32), "i": np.array([3], np.int32)}, "empty tensor .* which Core ML refuses"),
        (lambda x: mb.exp(x=x), {"x": (3,)}, {"x": np.zeros(4, np.float32)}, r"declares shape \(3,\), the value has \(4,\)"),
        (lambda x: mb.exp(x=x), {"x": (3,)}, {"y": np.zeros(3, np.float32)}, r"takes \['x'\], got \['y'\]"),
    ],
    ids=["unknown operation", "index past the end", "empty tensor", "wrong shape", "wrong name"],
)  # fmt: skip
def test_what_it_cannot_vouch_for_is_an_error(program: Program, body: Any, inputs: Any, feeds: Any, message: str) -> None:
    with pytest.raises(InferenceError, match=message):
        program(body, **inputs)(**feeds)


def test_an_endless_loop_ends(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_targets.coreml.evaluate._ROUNDS", 50)

    def body(x: Any) -> Any:
        return mb.while_loop(
            _cond=lambda y: mb.less(x=mb.reduce_sum(x=y, axes=[0]), y=1e9), _body=lambda y: (mb.tanh(x=y),), loop_vars=(x,)
        )

    with pytest.raises(InferenceError, match="did not end in 50 rounds"):
        program(body, x=(3,))(x=np.zeros(3, np.float32))


def test_types_of_half_inputs_hold(program: Program) -> None:
    run = program(lambda x: mb.cast(x=x, dtype="fp32"), dtype=types.fp16, x=(2,))
    assert run(x=np.float32([1 / 3, 1e-9])).tolist() == [float(np.float16(1 / 3)), 0.0]
