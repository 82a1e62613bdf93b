"""The programs that show what RALU's noise costs and what caching saves."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from fake_flux import SCHNELL, Opener, manifest

import ralu_caching
import ralu_noise
from elastic_runtime import Bundle, ElasticPipeline
from elastic_runtime.contract.manifest import Cost

COST = tuple(Cost(budget={"tokens": n}, flops=n**2 + 9 * n, weight_bytes=1, activation_bytes=1) for n in (1, 512, 1024))


def test_the_dense_noise_has_the_covariance_of_the_closed_form() -> None:
    drawn = np.concatenate([ralu_noise.dense(np.random.default_rng(i), 8, 1, 2.5, "cholesky") for i in range(200)], axis=1)
    wanted = np.eye(8)
    wanted[:4, :4] -= 1 / 2.5**2
    np.testing.assert_allclose(np.cov(drawn), wanted, atol=0.05)


def test_the_noise_program_tells_both(capsys: pytest.CaptureFixture[str]) -> None:
    ralu_noise.main(["--pixels", "128", "--rounds", "2", "--method", "cholesky", "eigh"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("64 tokens of 64 channels, 12 blocks of four; closed form: ")
    assert [line.split(":")[0] for line in lines[1:]] == ["dense, cholesky", "dense, eigh"]


def test_the_caching_program_has_a_row_for_each_plan_and_kind(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole = manifest(SCHNELL, classes=5)
    whole = msgspec.structs.replace(whole, cost=COST)
    opener = Opener(whole, lambda feeds: np.sin(3 * feeds["hidden_states"]) * feeds["timestep"][:, None, None])
    opener.bundle = Bundle(Path("nowhere"), whole)
    monkeypatch.setattr(ElasticPipeline, "from_pretrained", lambda bundle: ElasticPipeline(opener.bundle, opener))
    ralu_caching.main(["nowhere", "--classes", "1,3"])
    head, *rows, where = capsys.readouterr().out.splitlines()
    assert where == "fake"
    table = [dict(zip(head.split(", "), row.split(", "), strict=True)) for row in rows]
    assert [(row["plan"], row["caching"]) for row in table] == [
        (plan, kind) for plan in ("full", "4x", "7x") for kind in ("all steps", "reuse", "extrapolate")
    ]
    assert [row["steps computed"] for row in table[:3]] == ["20", "10", "11"]
    assert all(np.isfinite(float(row["PSNR dB"])) for row in table if row["caching"] != "all steps")
    assert float(table[1]["times fewer FLOPs"]) == 2
