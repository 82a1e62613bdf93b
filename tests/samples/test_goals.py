"""`samples/goals.py` on a report of stand-ins."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from bench_fakes import Clock, FakeRuntime, bundle, start

from elastic_bench.machine import machine
from elastic_bench.measure import measure, points
from elastic_bench.records import Peaks, Report, Settings, encode
from elastic_runtime.contract.manifest import Rounded
from elastic_runtime.device import Processor
from elastic_runtime.errors import UsageError
from goals import HEAD, best_peaks, goals, main, options


@dataclass
class Placed(FakeRuntime):
    """A runtime on the processor, in another precision than float32 unless told."""

    precision: str = "int8"
    processor: Processor = "cpu"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp("goals")
    clock, opened = Clock(), bundle(folder / "tiny")
    runtimes = [
        Placed("onnxruntime", clock, precision="fp32"), Placed("openvino-bf16", clock, base=0.005),
        FakeRuntime("torch-compile", clock, base=0.024),
        FakeRuntime("torch-bf16", clock, base=0.017), FakeRuntime("torch-openvino", clock, base=0.031),
    ]  # fmt: skip
    settings = Settings(steps=2, duration=0.1)
    measured, _ = measure(opened, runtimes, points(opened, [4, 64]), settings, start(clock))
    peaks = Peaks(flops_per_second=1e9, bytes_per_second=1e6, rates={"fp32": 1e9, "int8": 4e9})
    return Report(
        schema_version=1, created="now", command="elastic-export bench", machine=machine(), peaks=peaks, energy={}, settings=settings,
        bundles=(measured,),
    ), folder  # fmt: skip


def test_a_row_names_what_was_fastest_of_ours_and_of_the_peers(report: tuple[Report, Path]) -> None:
    from elastic_runtime import Bundle

    small, large = goals(report[0], report[0].bundles[0], Bundle.open(report[1] / "tiny").manifest, report[0].peaks)
    # bytes: 1000 of weights in int8 (4000 in float32) and 4 of activations, at 1 MB a second
    assert small.row() == (
        "| tiny | 1 | latents 4 | 14.00 | 2.00 (6.99) | 9.00 (openvino-bf16 int8) | 3.11 | 2.33 (bf16) | 3.89 (openvino) | 0.21 | "
        "1.00 (11%) |"
    )
    assert large.evenness == 1.0


def test_what_draws_worse_is_not_ours_to_count(report: tuple[Report, Path]) -> None:
    import msgspec

    from elastic_runtime import Bundle

    measured = report[0].bundles[0]
    worse = [
        msgspec.structs.replace(each, checked=tuple(msgspec.structs.replace(row, psnr_db=39.0) for row in each.checked))
        for each in measured.runtimes
    ]
    manifest = Bundle.open(report[1] / "tiny").manifest
    small, _ = goals(report[0], msgspec.structs.replace(measured, runtimes=tuple(worse)), manifest, report[0].peaks)
    assert small.best.runtime.runtime == "onnxruntime"


def test_what_is_computed_beside_few_bits_is_graded_too(report: tuple[Report, Path]) -> None:
    import msgspec

    from elastic_runtime import Bundle

    manifest = Bundle.open(report[1] / "tiny").manifest
    for graded, best in (["fp32", "int8"], "onnxruntime"), (["fp32", "int8", "bf16"], "openvino-bf16"):
        rows = tuple(Rounded(precision=name, budget={"latents": 64}, accuracy=0.9, frechet_distance=1.0) for name in graded)
        small, _ = goals(report[0], report[0].bundles[0], msgspec.structs.replace(manifest, precisions=rows), report[0].peaks)
        assert small.best.runtime.runtime == best


def test_peaks_are_the_best_that_the_machine_had(report: tuple[Report, Path]) -> None:
    import msgspec

    disturbed = msgspec.structs.replace(report[0], peaks=Peaks(flops_per_second=5e8, bytes_per_second=2e6, rates={"int8": 5e9}))
    assert best_peaks([report[0], disturbed]) == Peaks(flops_per_second=1e9, bytes_per_second=2e6, rates={"fp32": 1e9, "int8": 5e9})
    with pytest.raises(UsageError, match="of several machines, .* and .*another: give those of one"):
        best_peaks([report[0], msgspec.structs.replace(report[0], machine=msgspec.structs.replace(machine(), processor="another"))])


def test_the_page_is_filled(report: tuple[Report, Path], tmp_path: Path) -> None:
    (tmp_path / "goals.json").write_bytes(encode(report[0]))
    (tmp_path / "page.md").write_text("before\n<!-- figures goals -->\n<!-- end of figures -->\nafter\n")
    main(options().parse_args([str(tmp_path / "goals.json"), "--bundles", str(report[1]), "--page", str(tmp_path / "page.md")]))
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert HEAD in page
    assert "`make goals` on a" in page
