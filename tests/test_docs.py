"""Tables in the docs are those of the result files, and every path the README names exists."""

import json
import re
from pathlib import Path

from sparse_seg.reporting.benchmark import COLUMNS
from sparse_seg.reporting.comparison import comparison_table
from sparse_seg.reporting.tables import Table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_readme_table_is_the_result_files():
    result = json.loads((ROOT / "docs/results/camvid_r18.json").read_text())
    assert {"command", "commit", "machine", "date"} <= set(result)
    assert comparison_table(result["rows"]).to_markdown().strip() in README


def test_readme_speed_table_is_the_result_files():
    result = json.loads((ROOT / "docs/results/bench_r50.json").read_text())
    assert {"command", "commit", "machine", "date"} <= set(result)
    rows = [row for row in result["rows"] if row["fast"] or row["engine"] is None]
    columns = [column for column in COLUMNS if column.key not in ("peak_mib", "layout_share")]
    assert Table(columns, rows).to_markdown().strip() in README


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_named_tools_exist():
    for tool in re.findall(r"tools/(\w+)\.py", README):
        assert (ROOT / f"tools/{tool}.py").exists(), tool
