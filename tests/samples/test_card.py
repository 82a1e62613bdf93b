from pathlib import Path
from typing import Any

import pytest

from card import filled, plot, protocol, section, table, training
from elastic_runtime.contract.bundle import sha256
from record import machine, read, versions, write

ROOT = Path(__file__).parents[2]
PRETRAINED = ROOT / "elastic_export" / "pretrained"
RECORDS = sorted(PRETRAINED.glob("*.json"))


def record() -> dict[str, Any]:
    drawn = {(4.0, 16): (0.912, 20.04), (4.0, 256): (0.98, 5.5), (1.0, 16): (0.701, 180.0), (1.0, 256): (0.85, 110.0)}
    rows = [
        {"guidance": g, "budget": {"latents": n}, "accuracy": a, "frechet_distance": f, "flops": n * 10**7, "seconds": 45.0}
        for (g, n), (a, f) in drawn.items()
    ]
    return {
        "family": "elit-sit",
        "config": {},
        "quality": rows[:2],
        "training": {
            "step": 4000, "loss": 0.14321, "hours": 1.25, "threads": 2, "machine": "2-core machine", "digits": 3500,
            "batch": 64, "lr": 1e-3, "ema": 0.999,
        },
        "evaluation": {
            "axis": "latents",
            "protocol": {
                "samples": 1000, "steps": 20, "sampler": "euler",
                "guidance": [4.0, 1.0], "guidance_budget": {"latents": 16}, "seed": 0,
            },
            "real": {"pictures": 1000, "accuracy": 0.984, "frechet_distance": 3.0},
            "rows": rows,
            "where": "onnxruntime 1.31 CPU",
            "machine": "2-core machine",
        },
    }  # fmt: skip


def test_table_and_words_quote_the_record() -> None:
    assert table(record()).splitlines() == [
        "| latents | GFLOPs a forward pass | as asked, guidance 4 | Fréchet distance | as asked, no guidance | Fréchet distance |",
        "|---:|---:|---:|---:|---:|---:|",
        "| 16 | 0.16 | 91.2% | 20.0 | 70.1% | 180.0 |",
        "| 256 | 2.56 | 98.0% | 5.5 | 85.0% | 110.0 |",
        "| real digits | | 98.4% | 3.0 | 98.4% | 3.0 |",
    ]
    words = protocol(record())
    assert "guidance 4 and no guidance (the weak branch at latents=16)" in words
    assert "in 3 minutes on a 2-core machine" in words
    assert "4,000 steps of 64" in training(record())


def test_a_model_graded_beside_it_has_columns_of_its_own(tmp_path: Path) -> None:
    own = record()
    other = own["evaluation"] | {"rows": [row | {"accuracy": row["accuracy"] / 2} for row in own["evaluation"]["rows"]]}
    both = own | {"beside": {"without distillation": other}}
    head, _, first, *_ = table(both).splitlines()
    assert head.count("without distillation") == 2
    assert first == "| 16 | 0.16 | 91.2% | 20.0 | 70.1% | 180.0 | 45.6% | 20.0 | 35.0% | 180.0 |"
    assert "without" not in protocol(both)
    with pytest.raises(SystemExit, match="'without distillation' was graded at other budgets"):
        table(own | {"beside": {"without distillation": other | {"rows": other["rows"][1:]}}})
    with pytest.raises(SystemExit, match="'without distillation' was graded with another protocol"):
        table(own | {"beside": {"without distillation": other | {"protocol": other["protocol"] | {"steps": 5}}}})


def test_a_model_without_the_axis_has_a_row() -> None:
    own = record()
    plain = [row | {"budget": {"loops": 1}, "accuracy": 0.5} for row in own["evaluation"]["rows"][::2]]
    beside = {"plain": own["evaluation"] | {"axis": "loops", "rows": plain}}
    assert table(own | {"beside": beside}).splitlines()[-2] == "| plain | 0.16 | 50.0% | 20.0 | 50.0% | 180.0 |"


def test_dropped_tokens_have_a_table_of_their_own() -> None:
    own = record()
    row = {"drop_fraction": 0.3, "kept": [40.0, 60.0], "flops": 2.5e8, "accuracy": 0.9, "frechet_distance": 7.0}
    with_drops = own | {"evaluation": own["evaluation"] | {"drops": [row]}}
    assert "| 30% | 50 | 0.25 | 90.0% | 7.0 |" in section(with_drops)
    assert "with 30% dropped, from the first step, pure noise, to the last: 40, 60." in section(with_drops)
    assert "dropped" not in section(own)


def test_a_record_without_figures_says_so() -> None:
    assert section({"quality": []}) == "Not measured yet."
    with pytest.raises(SystemExit, match=r"samples/evaluate\.py"):
        table({"quality": []})


def test_only_the_marked_part_of_a_page_changes() -> None:
    page = "before\n<!-- figures a -->\nold\n<!-- end of figures -->\nbetween\n<!-- figures b -->\nkept\n<!-- end of figures -->\n"
    new = filled(page, "a", "new", "page.md")
    assert new == page.replace("old", "new")
    assert filled(new, "a", "new", "page.md") == new
    with pytest.raises(SystemExit, match=r"page\.md must hold '<!-- figures c -->'"):
        filled(page, "c", "new", "page.md")


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    plot(record(), tmp_path / "plots" / "quality.png")
    assert (tmp_path / "plots" / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_records_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "figures.json"
    write(path, {"quality": []})
    with pytest.raises(TypeError):
        write(path, {"quality": object()})
    assert read(path) == {"quality": []}
    for content, message in (("{", "is not JSON"), ("[]", "holds a JSON list")):
        path.write_text(content)
        with pytest.raises(SystemExit, match=message):
            read(path)
    with pytest.raises(SystemExit, match="No such file"):
        read(tmp_path / "none.json")


def test_machine_and_versions_are_words() -> None:
    assert "-core " in machine()
    assert versions("pytest", "no-such-package").keys() == {"python", "pytest"}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
@pytest.mark.parametrize("page", [None, ROOT / "docs" / "quality.md"], ids=["card", "quality.md"])
def test_pages_say_what_the_records_say(path: Path, page: Path | None) -> None:
    page = page or path.with_suffix(".md")
    content = section(read(path))
    assert filled(page.read_text(encoding="utf-8"), path.stem, content, str(page)) == page.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_figures_are_of_the_packaged_weights(path: Path) -> None:
    whole = read(path)
    if not whole["quality"]:
        pytest.skip(f"{path.name} holds no figures yet")
    folder = path.with_suffix("")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors" if folder.is_dir() else path.with_suffix(".safetensors")
    assert whole["evaluation"]["weights_sha256"] == sha256(weights)
