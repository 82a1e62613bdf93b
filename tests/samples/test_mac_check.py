"""`samples/mac_check.py` with the evaluator in the Mac's place."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from elastic_runtime import Bundle, MissingError, Span

pytest.importorskip("coremltools", reason="the Core ML room needs coremltools")


@pytest.fixture(scope="module")
def bundle(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from elastic_export.capture.capture import capture
    from elastic_export.capture.zoo import Request, load
    from elastic_export.exporting import export_capture
    from elastic_runtime import Budget
    from elastic_targets.coreml import CoremlOptions

    captured = capture(load(Request("elit-sit", golden / "elit-c.pt", golden / "elit-c.json")), {}, Span(1, 4))
    options = CoremlOptions(budgets=(Budget(latents=16), Budget(latents=64)))
    return export_capture(captured, "coreml", options, tmp_path_factory.mktemp("mac") / "bundle", "elastic-export coreml")


def test_the_table_has_a_row_for_each_unit_and_budget(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mac_check
    from elastic_targets.coreml import EvaluatorSession

    class OnAMac(EvaluatorSession):
        def __init__(self, *arguments: Any, compute_units: str):
            super().__init__(*arguments)

    def plan(package: Path, units: str) -> dict[str, Counter[str]]:
        assert str(package) == "denoiser.mlmodelc"
        return {"latents_64": Counter(ane=3, cpu=1)}

    monkeypatch.setattr(mac_check, "CoremlSession", OnAMac)
    monkeypatch.setattr(mac_check, "compiled", lambda bundle, artifact, cache: (Path("denoiser.mlmodelc"), None))
    monkeypatch.setattr(mac_check, "obstacle", lambda artifact: None)
    monkeypatch.setattr(mac_check, "where", plan)
    monkeypatch.setattr(sys, "argv", ["mac_check.py", str(bundle.folder), "--units", "cpu,all", "--runs", "1"])
    assert mac_check.main() == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("coreml/")]
    assert [(row[1], row[2], row[6]) for row in rows] == [
        (unit, budget, "ok") for unit in ("cpu", "all") for budget in ("latents=16", "latents=64")
    ]
    assert rows[1][7:] == ["3", "ane,", "1", "cpu"]


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac can run it")
def test_elsewhere_it_says_why_it_cannot(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import mac_check

    monkeypatch.setattr(sys, "argv", ["mac_check.py", str(bundle.folder)])
    with pytest.raises(MissingError, match="Core ML needs macOS"):
        mac_check.main()
