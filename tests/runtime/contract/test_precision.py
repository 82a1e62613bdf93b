"""The table of precisions is whole, and what is read from it."""

from typing import get_args

import pytest

from elastic_runtime.choosing.cost import Rates
from elastic_runtime.contract.precision import COMPRESSIONS, EXACT, PRECISIONS, RATES, Compression, Name, held, rank, tolerance
from elastic_runtime.device import Peak, catalogue, listed_peak
from elastic_runtime.device.packages import BACKENDS

GPU = Peak(name="a GPU", flops={"fp32": 1.0, "fp16": 4.0, "int8": 8.0}, bandwidth=1.0, origin="made up")
CPU = Peak(name="a CPU", flops={"fp32": 1.0}, bandwidth=1.0, origin="made up")


def test_the_names_that_a_manifest_may_hold_are_the_rows() -> None:
    assert get_args(Name) == tuple(PRECISIONS)
    assert get_args(Compression) == tuple(COMPRESSIONS)


def test_rows_name_backends_and_rows_that_exist_and_end_at_float32() -> None:
    for name, row in PRECISIONS.items():
        assert row.name == name
        assert set(row.backends) <= set(BACKENDS)
        assert row.peak({"fp32": 7.0}) == 7.0, "every chain of fallbacks ends there"
        assert row.weight_bytes <= row.activation_bytes or name == EXACT
        assert bool(row.backends) == bool(row.targets)


@pytest.mark.parametrize(
    ("name", "on_gpu"),
    [
        ("fp32", 1.0),
        ("fp16", 4.0),
        ("bf16", 4.0),
        ("int8", 8.0),
        ("int8w", 1.0),
        ("int4w", 1.0),
        ("fp8", 4.0),
        ("nvfp4", 4.0),
        ("int8qdq", 8.0),
        ("int4qdq", 4.0),
    ],
)
def test_a_precision_is_rated_by_what_it_computes_in(name: str, on_gpu: float) -> None:
    assert Rates.of(GPU, name).flops == on_gpu
    assert Rates.of(CPU, name).flops == 1.0


def test_every_listed_device_is_rated_at_every_precision() -> None:
    for entry in catalogue():
        listed = listed_peak(entry)
        assert set(listed.flops) <= set(RATES)
        assert all(Rates.of(listed, name).flops > 0 for name in PRECISIONS)
    (h200,) = (listed_peak(entry) for entry in catalogue() if entry.id == "h200")
    assert Rates.of(h200, "nvfp4").flops == Rates.of(h200, "fp8").flops == 1979e12


def test_fewer_bits_are_held_to_a_wider_bound_and_rank_below() -> None:
    assert tolerance("fp32") == 1e-5
    assert tolerance("fp16", "palette4") == 2.5e-1
    order = [
        ("fp32", None),
        ("fp16", None),
        ("fp16", "palette8"),
        ("fp16", "int8"),
        ("fp16", "w8a8"),
        ("fp16", "palette4"),
        ("bf16", None),
        ("int4w", None),
    ]
    assert sorted(order, key=lambda pair: rank(*pair)) == order


def test_rows_of_a_run_depend_on_each_other_where_a_scale_is_found_in_it() -> None:
    assert [name for name, row in PRECISIONS.items() if row.by_batch] == ["int8"]


def test_graphs_of_convolutions_are_held_in_the_base_of_what_was_asked_for() -> None:
    assert {name: held(name, "decoder") for name in ("fp16", "int4w", "fp8", "nvfp4")} == {
        "fp16": "fp16", "int4w": "fp32", "fp8": "fp16", "nvfp4": "fp16",
    }  # fmt: skip
    assert held("fp8", "text_encoder_2") == "fp8"
