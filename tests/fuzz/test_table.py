"""The table of docs/reliability.md is the result file, and nothing in it went wrong."""

import json

from tests.fuzz.table import RESULT, to_markdown
from tests.fuzz.test_checkpoints import KINDS


def test_table_is_the_result_file():
    rows = json.loads(RESULT.read_text())["rows"]
    assert to_markdown(rows).strip() in (RESULT.parents[1] / "reliability.md").read_text()
    assert set(KINDS) <= {row["what"] for row in rows}
    assert all(row["traceback"] == row["wrong"] == 0 for row in rows)
    for row in rows:
        outcomes = ("right", "refused", "without_checksum")
        assert row["tried"] == sum(row[outcome] for outcome in outcomes)
