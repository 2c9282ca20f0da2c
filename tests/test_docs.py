"""Tables in the docs are those of the result files, and every path the README names exists."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sparse_seg.config.docs import render
from sparse_seg.data.camvid import CamVid
from sparse_seg.reporting.ablation import ablation_table, class_table, seed_table
from sparse_seg.reporting.benchmark import COLUMNS, benchmark_table, profile_table
from sparse_seg.reporting.comparison import comparison_table, fraction_table
from sparse_seg.reporting.tables import Column, Table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# of an ablation, where there is little room
SHORT = (
    *("network", "run", "exchange", "miou", "miou_std", "boundary_miou", "parameters_m", "gmacs"),
    *("milliseconds", "parameters_share", "gmacs_share", "milliseconds_share"),
)
README_RUNS = ("dense OS8", "dense OS16", "confidence, f=0.2", "confidence, f=0.15")
README_NETWORKS = ("baseline", "student", "student + detail", "slim student + detail")


def test_readme_table_is_the_result_files():
    result = json.loads((ROOT / "docs/results/camvid_r18.json").read_text())
    assert {"command", "commit", "machine", "date"} <= set(result)
    assert comparison_table(result["rows"]).to_markdown().strip() in README


@pytest.mark.parametrize("name", ["bench_r50", "bench_r101"])
def test_readme_speed_tables_are_the_result_files(name: str):
    rows = [row for row in benchmark_rows(name) if row["fast"] or row["engine"] != "gather"]
    rows = [row for row in rows if row["engine"] != "spconv"]
    columns = [column for column in COLUMNS if column.key not in ("peak_mib", "layout_share")]
    assert Table(columns, rows).to_markdown().strip() in README


@pytest.mark.parametrize("name", ["bench_r50", "bench_r50_train"])
def test_whole_speed_tables_are_the_result_files(name: str):
    text = (ROOT / "docs/performance.md").read_text()
    assert benchmark_table(benchmark_rows(name)).to_markdown().strip() in text


def test_profile_table_is_the_result_file():
    result = json.loads((ROOT / "docs/results/profile_r50.json").read_text())
    rows = [row for row in result["profile"] if row["network"] == "selective f=0.1" and "fast" in row["form"]]
    assert profile_table(rows).to_markdown().strip() in (ROOT / "docs/performance.md").read_text()


def benchmark_rows(name: str) -> list[dict[str, Any]]:
    result = json.loads((ROOT / f"docs/results/{name}.json").read_text())
    assert {"command", "commit", "machine", "date"} <= set(result)
    return result["rows"]


@pytest.mark.parametrize("exchange", ["linear", "nearest"])
@pytest.mark.parametrize("key", ["miou", "boundary_miou"])
def test_mask_tables_are_the_result_file(key: str, exchange: str):
    rows = measured("camvid_r34_masks")["rows"]
    assert {row["images"] for row in rows} == {101}
    assert fraction_table(rows, key, exchange).to_markdown().strip() in page("masks")


@pytest.mark.parametrize("key", ["miou", "boundary_miou"])
def test_mask_tables_of_the_other_network_are_its_result_file(key: str):
    assert fraction_table(measured("camvid_masks")["rows"], key, "linear").to_markdown() in page("masks")


@pytest.mark.parametrize("name", ["camvid_r34_scores", "camvid_r34_straight_through"])
def test_tables_of_scores_are_the_result_files(name: str):
    columns = [column for column in comparison_table([]).columns if "mIoU" in column.title]
    table = Table([Column("network", "network"), *columns], measured(name)["rows"])
    assert table.to_markdown() in page("masks")


def test_table_of_three_strides_is_the_result_file():
    result = measured("camvid_strides_4_8_16")
    assert "model.strides=[4,8,16] model.mask.middle_fraction=0.2" in result["command"]
    assert comparison_table(result["rows"]).to_markdown() in page("masks")
    assert ablation_table(measured("ablation_camvid_strides")["rows"], SHORT).to_markdown() in page("masks")


def test_ablation_tables_are_the_result_file():
    rows = measured("ablation_camvid")["rows"]
    assert ablation_table(rows).to_markdown() in page("ablation")
    assert seed_table(rows).to_markdown() in page("ablation")
    names = CamVid.classes.names
    assert class_table(rows, names).to_markdown() in page("ablation")
    shown = [row for row in rows if row["run"] in README_RUNS and row["network"] in README_NETWORKS]
    assert ablation_table(shown, SHORT).to_markdown() in README


def test_tables_of_the_longer_training_are_the_result_file():
    rows = measured("ablation_camvid_long")["rows"]
    assert ablation_table(rows, SHORT).to_markdown() in page("ablation")
    assert seed_table(rows).to_markdown() in page("ablation")
    shown = [row for row in rows if row["run"] in README_RUNS]
    assert ablation_table(shown, SHORT).to_markdown() in README


def test_table_of_ways_to_train_is_the_result_file():
    rows = measured("ablation_camvid_ways")["rows"]
    assert seed_table(rows).to_markdown() in page("ablation")


def measured(name: str) -> dict[str, Any]:
    result = json.loads((ROOT / f"docs/results/{name}.json").read_text())
    assert {"command", "machine", "date"} <= set(result)
    assert "commits" in result or "commit" in result
    return result


def page(name: str) -> str:
    return (ROOT / f"docs/{name}.md").read_text()


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_linked_files_exist(page: str):
    path = ROOT / page
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_named_tools_exist():
    for tool in re.findall(r"tools/(\w+)\.py", README):
        assert (ROOT / f"tools/{tool}.py").exists(), tool


def test_page_of_config_keys_is_the_schema():
    assert page("config") == render(), "run: python -m sparse_seg.config.docs > docs/config.md"
