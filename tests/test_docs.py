"""Tables in the docs are those of the result files, and every path that the docs name exists."""

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import sparse_seg
from sparse_seg.config import load_config, model_config
from sparse_seg.config.docs import render
from sparse_seg.lab.ablation.report import ablation_table
from sparse_seg.lab.benchmark.measure import COLUMNS as BENCHMARK
from sparse_seg.lab.compare.report import comparison_table
from sparse_seg.lab.report.tables import COLUMNS, Column, Table, table
from sparse_seg.networks.encoder_decoder import build_module
from sparse_seg.run.network import SelectiveNetwork

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
# Columns of an ablation's table where there is little room.
SHORT = (
    *("network", "run", "exchange", "miou", "miou_std", "boundary_miou", "parameters_m", "gmacs"),
    *("milliseconds", "parameters_share", "gmacs_share", "milliseconds_share"),
)


def page(name: str) -> str:
    return (ROOT / f"docs/{name}.md").read_text()


def measured(name: str) -> dict[str, Any]:
    result = json.loads((ROOT / f"docs/results/{name}.json").read_text())
    assert {"command", "machine", "date"} <= set(result)
    assert "commits" in result or "commit" in result
    return result


def rows_of(name: str) -> list[dict[str, Any]]:
    return measured(name)["rows"]


# -- tables by what they show


def speed_table(name: str) -> Table:
    """The rows whose way to run still exists: no layers that packed weights, no dense run by the gather."""
    rows = [
        row | {"network": row["network"].replace("plain", "dense")}
        for row in measured(name)["rows"]
        if row["scope"] != "stages" and not row["fast"] and row["network"] != "dense OS8"
    ]
    shown = ("network", "form", "milliseconds", "spread", "gmacs", "speedup", "mac_ratio", "peak_mib")
    return table(rows, [key for key in BENCHMARK if key in shown])


def runtimes_table() -> Table:
    """Of each network and run, on one thread and on two: ms, ratio to dense OS8, time share and lift."""
    kinds = {"fine": "dense OS8", "coarse": "dense OS16", "selective": "selective"}
    rows = dict[tuple[str, str], dict[str, Any]]()
    for network, files in RUNTIMES.items():
        for row in (row for file in files for row in measured(f"runtimes_{file}")["runtimes"]):
            kind, runtime, *merge = row["run"].split()
            run = ", ".join([kinds[kind], *merge, runtime])
            line = rows.setdefault((network, run), {"network": network, "run": run})
            values = row | {"ms": f"{row['milliseconds']:.1f} ({row['least']:.1f})"}
            line |= {f"{key} {row['threads']}": value for key, value in values.items()}
    titles = {"of_fine": "of dense OS8", "time_share": "time share", "lift": "lift"}
    columns = [Column("network", "network"), Column("run", "run")]
    for threads, title in ((1, "ms, 1 thread"), (2, "ms, 2 threads")):
        columns += [Column(f"ms {threads}", title)]
        columns += [Column(f"{key} {threads}", title, "{:.2f}") for key, title in titles.items()]
    return Table(columns, list(rows.values()))


RUNTIMES = {
    "camvid-slim, f=0.15": ("light_1", "light_2"),
    "ResNet-18 x0.625, f=0.2": ("r18_1", "r18_2"),
    "DeepLabV3-ResNet-50, f=0.1": ("r50_2",),
}


def pivot(
    first: str,
    cells: Iterable[tuple[str, str, Any]],
    titles: Mapping[str, str] | None = None,
    form: str = "{}",
) -> Table:
    """A line for each name and a column for each key, of (name, key, value)."""
    lines, found = dict[str, dict[str, Any]](), dict[str, str]()
    for name, key, value in cells:
        lines.setdefault(name, {first: name})[key] = value
        found[key] = key
    columns = [Column(key, title, form) for key, title in (titles or found).items()]
    return Table([Column(first, first), *columns], list(lines.values()))


def by_run(rows: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> Table:
    """A line per network, a column per way to run it."""

    def run_of(row: dict[str, Any]) -> str:
        rule = f", {row['exchange']}" if row["exchange"] in ("none", "nearest") else ""
        return row["run"].removeprefix("confidence, ") + rule

    rows = sorted(rows, key=lambda row: not row["dense"])
    return pivot("network", ((row["network"], run_of(row), cell(row)) for row in rows))


def mean_and_seeds(row: dict[str, Any]) -> str:
    return f"{row['miou']:.2f} ({', '.join(f'{miou:.2f}' for miou in row['mious'])})"


def fraction_table(name: str, key: str, exchange: str) -> Table:
    """One value of the selective rows: a line per policy, a column per fine fraction, under one rule."""
    own = [row for row in rows_of(name) if row["policy"] and row["exchange"] == exchange]
    titles = {f"f={one:g}": f"f={one:g}" for one in sorted({row["fine_fraction"] for row in own})}
    cells = ((row["policy"], f"f={row['fine_fraction']:g}", row[key]) for row in own)
    return pivot("policy", cells, titles, "{:.2f}")


def without(table: Table, *keys: str) -> Table:
    return Table([column for column in table.columns if column.key not in keys], table.rows)


def compared(name: str, *hidden: str) -> Table:
    """A comparison's rows."""
    return without(comparison_table(rows_of(name)), *hidden)


def score_table(name: str) -> Table:
    return compared(name, "gmacs", "milliseconds")


def longer_table() -> Table:
    """Of the longer training, mIoU by seed."""
    rows = [row | {"miou": mean_and_seeds(row)} for row in rows_of("ablation_camvid_long")]
    shown = ablation_table(rows, [key for key in SHORT if key not in ("exchange", "miou", "miou_std")])
    return Table([*shown.columns[:2], Column("miou", "mIoU %"), *shown.columns[2:]], shown.rows)


def dense_trainings() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of the ablation, the rows of networks that were trained dense: at two strides, and the others with one
    network of each size."""
    dense = [row for row in rows_of("ablation_camvid") if "selective" not in row["network"]]
    two = [row for row in dense if "8/16/32" not in row["run"]]
    one_of_each_size = ("baseline", "student", "slim student + detail")
    return two, [row for row in dense if row not in two or row["network"] in one_of_each_size]


def cost_table() -> Table:
    keys = [*(key for key in SHORT if "miou" not in key), "peak_mib"]
    return ablation_table(dense_trainings()[1], keys)


def auto_table() -> Table:
    columns = [Column(count, f"{count} images", "{:.1f}") for count in ("1", "10", "30", "300")]
    return Table([Column("run", "run"), *columns], rows_of("predict_auto"))


def previous_table() -> Table:
    rows = [{"pan": pan, **row} for pan in (0, 8, 32) for row in rows_of(f"previous_scenes_{pan}")]
    table = without(comparison_table(rows), "milliseconds")
    return Table([Column("pan", "px a frame", "{}"), *table.columns], rows)


# networks of docs/results.md that were trained longer: result file, epochs, config and what it sets
ASPP = "depths=[2,3,4,1] head=deeplabv3 head_channels=48 aspp_rates=[4,8] aspp_separable=normed"
LONGER = {
    "baseline, DeepLabV3-ResNet-34 x0.375": ("camvid_h100_r34_gain", 131, "camvid_r34", ""),
    "ResNet-18 x0.625, lite": ("camvid_h100_r18_gain", 131, "camvid_r18", ""),
    "ResNet-18 x0.625, lite, seed 1": ("camvid_h200_r18_seed1", 131, "camvid_r18", ""),
    "light": ("camvid_exchange_light_4000", 131, "camvid_light", ""),
    "light, without stress on detail": ("camvid_h200_nodetail", 131, "camvid_light", ""),
    "slim student": ("camvid_exchange_slim", 131, "camvid_student_slim", ""),
    "slim student, seed 1": ("camvid_h200_slim_seed1", 131, "camvid_student_slim", ""),
    "light, separable ASPP": ("camvid_exchange_aspp", 131, "camvid_light", f"{ASPP} separable=normed"),
    "light, longer": ("camvid_exchange_light", 294, "camvid_light", ""),
    "light, larger batches": ("camvid_h200_plain", 366, "camvid_light", ""),
    "light + inplace distillation": ("camvid_h200_inplace", 366, "camvid_light", ""),
    "light + inplace distillation, seed 1": ("camvid_h200_inplace_seed1", 366, "camvid_light", ""),
    "the first of them, tuned, as shipped": ("camvid_light", 369, "camvid_light", ""),
}
SHARE = 0.15  # of fine blocks in the two tables below


def ways_of(file: str, exchanges: tuple[str | None, ...]) -> list[dict[str, Any]]:
    """The rows of a comparison that are dense, and with confidence merged whole under these rules."""
    rows = [row for row in measured(file)["rows"] if row.get("merge") != "patch"]
    wanted = [("confidence", SHARE, exchange) for exchange in exchanges]
    return [
        row
        for row in rows
        if not row["policy"] or (row["policy"], row["fine_fraction"], row["exchange"]) in wanted
    ]


def letter_table() -> Table:
    """Parameters, multiply-adds and accuracy of each network, dense and selective."""
    rows = list[dict[str, Any]]()
    for name, (file, epochs, config, changes) in LONGER.items():
        changed = [f"model.{change}" for change in changes.split()]
        network = build_module(model_config(load_config(ROOT / f"configs/{config}.yaml", changed)), 8)
        millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        for row in ways_of(file, (None, "linear")):
            run = "confidence, f=0.15" if row["policy"] else row["network"]
            rows.append(row | {"network": name, "epochs": epochs, "run": run, "parameters": millions})
    for row in rows:
        row |= {f"{key}_share": 100 * row[key] / rows[0][key] for key in ("parameters", "gmacs")}
    own = {"epochs": Column("epochs", "epochs"), "parameters": Column("parameters", "M params", "{:.2f}")}
    keys = [*("network", "epochs", "run", "miou", "boundary_miou"), *("parameters", "gmacs")]
    keys += [f"{key}_share" for key in keys[-2:]]
    return Table([own.get(key) or COLUMNS[key] for key in keys], rows)


def rule_table(first: str, files: dict[str, str], titles: dict[str, str]) -> Table:
    """mIoU of networks run dense and with confidence under each rule."""
    cells = (
        (name, row["exchange"] or row["network"], row["miou"])
        for name, file in files.items()
        for row in ways_of(f"camvid_{file}", ("linear", "none", "separate"))
    )
    return pivot(first, cells, titles, "{:.2f}")


RULES = {key: key for key in ("dense OS16", "separate", "none", "linear", "dense OS8")}
UNDER = {"dense OS16": "dense OS16", "separate": "run under separate", "linear": "run under linear"}
DENSE = {"light + inplace distillation": "exchange_light_inplace", "light, longer": "exchange_light"}
DENSE |= {"light": "exchange_light_4000", "slim student": "exchange_slim"}
DENSE |= {"light, separable ASPP": "exchange_aspp", "DeepLabV3-ResNet-34 x0.375": "exchange_r34"}
TUNED = {"light, longer": "exchange_light", "tuned, linear": "exchange_tuned_linear"}
TUNED |= {"tuned, separate": "exchange_tuned_separate"}
SCRATCH = {"linear": "h200_linear", "separate": "h200_separate"}


def inplace_table() -> Table:
    """mIoU of `light` with and without it."""
    files = {"without, seed 0": "camvid_h200_plain", "with, seed 0": "camvid_h200_inplace"}
    files |= {"with, seed 1": "camvid_h200_inplace_seed1", "with, seed 0, tuned": "camvid_light"}
    columns = ("dense OS8", "dense OS16", "confidence, f=0.15", "accuracy share")
    cells = list[tuple[str, str, float]]()
    for name, file in files.items():
        fine, coarse, selective = (row["miou"] for row in ways_of(file, (None, "linear")))
        values = (fine, coarse, selective, (selective - coarse) / (fine - coarse))
        cells += [(name, column, value) for column, value in zip(columns, values, strict=True)]
    return pivot("inplace distillation", cells, form="{:.2f}")


def captured_table() -> str:
    """Milliseconds: medians of processor time on one thread, least wall time on two."""
    lines = []
    result = json.loads((ROOT / "docs/results/runtimes_captured.json").read_text())
    for row in result["rows"]:
        cells = [row["network"], f"({row['strides'][0]}, {row['strides'][1]})"]
        for threads, key in ((1, "processor_median"), (2, "wall_least")):
            if f"selective_{threads}" not in row:
                cells += ["–"] * 5
                continue
            runs = ("dense_fine", "dense_coarse", "selective")
            fine, coarse, ours = (row[f"{run}_{threads}"][key] for run in runs)
            cells += [f"{fine:.0f}", f"{coarse:.0f}", f"{ours:.0f}", f"{ours / fine:.2f}"]
            cells.append(f"{(ours - coarse) / (fine - coarse):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


Made = Callable[[], Table | str]
TABLES: list[tuple[str, Made]] = [
    ("results", lambda: compared("camvid_r18")),
    *(("performance", partial(speed_table, name)) for name in ("bench_r50", "bench_r50_train")),
    *(("performance_export", made) for made in (runtimes_table, auto_table, captured_table)),
    *(
        ("masks", partial(fraction_table, "camvid_r34_masks", key, rule))
        for key in ("miou", "boundary_miou")
        for rule in ("linear", "nearest")
    ),
    *(("masks", partial(fraction_table, "camvid_masks", key, "linear")) for key in ("miou", "boundary_miou")),
    *(("masks", partial(score_table, f"camvid_r34_{name}")) for name in ("scores", "straight_through")),
    ("masks", lambda: compared("camvid_strides_4_8_16")),
    ("masks", lambda: ablation_table(rows_of("ablation_camvid_strides"), SHORT)),
    ("masks", lambda: compared("camvid_light_gain", "milliseconds")),
    ("masks", previous_table),
    ("results", lambda: compared("street_lite0_unseen", "milliseconds")),
    ("ablation", lambda: by_run(dense_trainings()[0], mean_and_seeds)),
    ("ablation", lambda: by_run(dense_trainings()[0], lambda row: f"{row['boundary_miou']:.2f}")),
    ("ablation", lambda: by_run(rows_of("ablation_camvid_ways"), mean_and_seeds)),
    *(("ablation", made) for made in (cost_table, longer_table)),
    *(("ablation", partial(rule_table, "network", files, RULES)) for files in (DENSE, TUNED)),
    ("ablation", partial(rule_table, "trained under", SCRATCH, UNDER | {"dense OS8": "dense OS8"})),
    *(("results", made) for made in (letter_table, inplace_table)),
]


@pytest.mark.parametrize(("name", "made"), TABLES)
def test_a_table_of_a_page_is_that_of_its_result_files(name: str, made: Made):
    table = made()
    assert (table if isinstance(table, str) else table.to_markdown()).strip() in page(name)


def test_kills_end_as_the_page_says():
    rows = rows_of("kills")
    seconds = [row["seconds"] for row in rows]
    said = f"{len(rows)} jobs ended {min(seconds):.1f} to {max(seconds):.1f} s after"
    assert said in " ".join(page("several-gpus").split())
    assert max(seconds) < 15
    assert all(len(row["lines"]) == 1 for row in rows)


@pytest.mark.parametrize("path", ["docs/results.md", "sparse_seg/weights/camvid-slim.md", "README.md"])
def test_scores_of_the_shipped_weights_are_the_result_file(path: str):
    text = (ROOT / path).read_text()
    rows = {row["network"]: row for row in rows_of("camvid_light")}
    for name in ("dense OS8", "selective, confidence, f=0.15"):
        assert f"{rows[name]['miou']:.2f}" in text
        assert f"{rows[name]['gmacs']:.2f}" in text


# -- what pages name


def test_readme_is_short():
    assert README.count("\n") <= 125


def test_page_of_config_keys_is_the_schema():
    assert page("config") == render(), "run: python -m sparse_seg.config.docs > docs/config.md"


@pytest.mark.parametrize("name", DOCS)
def test_linked_files_and_headings_exist(name: str):
    path = ROOT / name
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", path.read_text()):
        target = path.parent / link if link else path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", text).lower().replace(" ", "-") for text in headings}


@pytest.mark.parametrize("name", DOCS)
def test_named_tools_targets_and_paths_exist(name: str):
    text = (ROOT / name).read_text()
    for tool in re.findall(r"tools/(\w+)\.py", text):
        assert (ROOT / f"tools/{tool}.py").exists(), tool
    for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for named in re.findall(r"`((?:tests|configs|sparse_seg)/[\w./-]+)`", text):
        assert (ROOT / named).exists(), named


@pytest.mark.parametrize("name", DOCS)
def test_tools_are_not_called_as_programs(name: str):
    """They are no executables: a command runs them by python or torchrun, or is sparse-seg's."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```.*\n((?:.*\n)*?)```", text, re.MULTILINE)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```(.*\n)*?```", "", text, flags=re.MULTILINE))
    for command in [*inline, *(line for block in blocks for line in block.splitlines())]:
        if re.search(r"tools/\w+\.py\s+\S", command):
            assert re.search(r"\b(python|torchrun)\b", command), command


def test_names_in_the_readmes_example_exist():
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    used = [node for node in ast.walk(ast.parse("\n".join(examples))) if isinstance(node, ast.Attribute)]
    owners = {"sparse_seg": sparse_seg, "model": SelectiveNetwork, "net": SelectiveNetwork}
    seen = {node.attr for node in used if isinstance(node.value, ast.Name) and node.value.id in owners}
    assert {
        "selective",
        "report",
        "dense",
        "refine",
        "classify",
        "segment",
        "load_model",
        "in_runtime",
    } <= seen
    for node in used:
        if isinstance(node.value, ast.Name) and node.value.id in owners:
            assert hasattr(owners[node.value.id], node.attr), node.attr
