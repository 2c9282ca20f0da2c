"""Tables in the docs are those of the result files, and every path that the docs name exists."""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sparse_seg
from sparse_seg import build_model
from sparse_seg.config import load_config
from sparse_seg.config.docs import render
from sparse_seg.lab.ablation.report import ablation_table
from sparse_seg.lab.benchmark.measure import COLUMNS
from sparse_seg.lab.compare.report import comparison_table
from sparse_seg.lab.report.tables import Column, Table, table
from sparse_seg.run.network import SelectiveNetwork

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
# Columns of an ablation's table where there is little room.
SHORT = (
    *("network", "run", "exchange", "miou", "miou_std", "boundary_miou", "parameters_m", "gmacs"),
    *("milliseconds", "parameters_share", "gmacs_share", "milliseconds_share"),
)
SHORT_RUNS = ("dense OS8", "dense OS16", "confidence, f=0.2", "confidence, f=0.15")


def test_readme_is_short():
    assert README.count("\n") <= 125


def test_table_of_the_same_weights_is_the_result_file():
    result = measured("camvid_r18")
    assert comparison_table(result["rows"]).to_markdown().strip() in page("results")


@pytest.mark.parametrize("name", ["bench_r50", "bench_r50_train"])
def test_speed_tables_are_the_result_files(name: str):
    assert speed_table(name).to_markdown() in page("performance")


def speed_table(name: str) -> Table:
    """The rows whose way to run still exists: no layers that packed weights, no dense run by the gather."""
    rows = [
        row | {"network": row["network"].replace("plain", "dense")}
        for row in measured(name)["rows"]
        if row["scope"] != "stages" and not row["fast"] and row["network"] != "dense OS8"
    ]
    shown = ("network", "form", "milliseconds", "spread", "gmacs", "speedup", "mac_ratio", "peak_mib")
    return table(rows, [key for key in COLUMNS if key in shown])


def test_table_of_runtimes_is_the_result_files():
    assert runtimes_table().to_markdown() in page("performance_export")


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
    dense = [row for row in rows if "selective" not in row["network"]]  # trained so; the others stand below
    two = [row for row in dense if "8/16/32" not in row["run"]]
    assert by_run(two, mean_and_seeds) in page("ablation")
    assert by_run(two, lambda row: f"{row['boundary_miou']:.2f}") in page("ablation")
    one_of_each_size = ("baseline", "student", "slim student + detail")
    rows = [row for row in dense if row not in two or row["network"] in one_of_each_size]
    keys = [*(key for key in SHORT if "miou" not in key), "peak_mib"]
    assert ablation_table(rows, keys).to_markdown() in page("ablation")


def by_run(rows: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> str:
    """A line per network, a column per way to run it."""
    lines, runs = dict[str, dict[str, Any]](), dict[str, None]()
    for row in sorted(rows, key=lambda row: not row["dense"]):
        run = row["run"].removeprefix("confidence, ")
        run += f", {row['exchange']}" if row["exchange"] in ("none", "nearest") else ""
        lines.setdefault(row["network"], {"network": row["network"]})[run] = cell(row)
        runs[run] = None
    return Table([Column(key, key) for key in ("network", *runs)], list(lines.values())).to_markdown()


def mean_and_seeds(row: dict[str, Any]) -> str:
    return f"{row['miou']:.2f} ({', '.join(f'{miou:.2f}' for miou in row['mious'])})"


def test_tables_of_the_longer_training_are_the_result_file():
    rows = [row | {"miou": mean_and_seeds(row)} for row in measured("ablation_camvid_long")["rows"]]
    shown = ablation_table(rows, [key for key in SHORT if key not in ("exchange", "miou", "miou_std")])
    columns = [*shown.columns[:2], Column("miou", "mIoU %"), *shown.columns[2:]]
    assert Table(columns, shown.rows).to_markdown() in page("ablation")


def test_table_of_ways_to_train_is_the_result_file():
    assert by_run(measured("ablation_camvid_ways")["rows"], mean_and_seeds) in page("ablation")


def fraction_table(rows: list[dict[str, Any]], key: str, exchange: str | None = None) -> Table:
    """One value of the selective rows: a line per policy, a column per fine fraction, under one rule."""
    own = [row for row in rows if row["policy"] and row["exchange"] == exchange]
    lines: dict[str, dict[str, Any]] = {}
    for row in own:
        lines.setdefault(row["policy"], {"policy": row["policy"]})[f"{row['fine_fraction']:g}"] = row[key]
    fractions = sorted({row["fine_fraction"] for row in own})
    columns = [Column(f"{fraction:g}", f"f={fraction:g}", "{:.2f}") for fraction in fractions]
    return Table([Column("policy", "policy"), *columns], list(lines.values()))


def measured(name: str) -> dict[str, Any]:
    result = json.loads((ROOT / f"docs/results/{name}.json").read_text())
    assert {"command", "machine", "date"} <= set(result)
    assert "commits" in result or "commit" in result
    return result


def page(name: str) -> str:
    return (ROOT / f"docs/{name}.md").read_text()


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


def test_table_of_auto_is_the_result_file():
    rows = measured("predict_auto")["rows"]
    columns = [Column(count, f"{count} images", "{:.1f}") for count in ("1", "10", "30", "300")]
    assert Table([Column("run", "run"), *columns], rows).to_markdown().strip() in page("performance_export")


def test_page_of_config_keys_is_the_schema():
    assert page("config") == render(), "run: python -m sparse_seg.config.docs > docs/config.md"


def test_table_of_gain_and_merges_is_the_result_file():
    columns = [column for column in comparison_table([]).columns if column.key != "milliseconds"]
    assert Table(columns, measured("camvid_light_gain")["rows"]).to_markdown().strip() in page("masks")
    unseen = Table(columns, measured("street_lite0_unseen")["rows"])
    assert unseen.to_markdown().strip() in page("results")


def test_table_of_the_frame_before_is_the_result_files():
    rows = [{"pan": pan, **row} for pan in (0, 8, 32) for row in measured(f"previous_scenes_{pan}")["rows"]]
    columns = [column for column in comparison_table([]).columns if column.key != "milliseconds"]
    assert Table([Column("pan", "px a frame", "{}"), *columns], rows).to_markdown().strip() in page("masks")


def test_kills_end_as_the_page_says():
    rows = measured("kills")["rows"]
    seconds = [row["seconds"] for row in rows]
    said = f"{len(rows)} jobs ended {min(seconds):.1f} to {max(seconds):.1f} s after"
    assert said in " ".join(page("several-gpus").split())
    assert max(seconds) < 15
    assert all(len(row["lines"]) == 1 for row in rows)


@pytest.mark.parametrize("path", ["docs/results.md", "sparse_seg/weights/camvid-slim.md", "README.md"])
def test_scores_of_the_shipped_weights_are_the_result_file(path: str):
    text = (ROOT / path).read_text()
    rows = {row["network"]: row for row in measured("camvid_light")["rows"]}
    for name in ("dense OS8", "selective, confidence, f=0.15"):
        assert f"{rows[name]['miou']:.2f}" in text
        assert f"{rows[name]['gmacs']:.2f}" in text


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
        network = build_model(load_config(ROOT / f"configs/{config}.yaml", changed))
        millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        for row in ways_of(file, (None, "linear")):
            run = "confidence, f=0.15" if row["policy"] else row["network"]
            rows.append(row | {"network": name, "epochs": epochs, "run": run, "parameters": millions})
    for row in rows:
        row["parameters_share"] = 100 * row["parameters"] / rows[0]["parameters"]
        row["gmacs_share"] = 100 * row["gmacs"] / rows[0]["gmacs"]
    columns = [
        *(Column("network", "network"), Column("epochs", "epochs"), Column("run", "run")),
        *(Column("miou", "mIoU %", "{:.2f}"), Column("boundary_miou", "boundary mIoU %", "{:.2f}")),
        *(Column("parameters", "M params", "{:.2f}"), Column("gmacs", "GMACs", "{:.2f}")),
        *(Column("parameters_share", "params %", "{:.0f}"), Column("gmacs_share", "GMACs %", "{:.0f}")),
    ]
    return Table(columns, rows)


def test_the_letters_table_is_the_result_files():
    assert letter_table().to_markdown().strip() in page("results")


@pytest.mark.parametrize("prefix", ["", "tuned_"], ids=["dense training", "selective fine-tuning"])
def test_tables_of_exchange_rules_are_the_result_files(prefix: str):
    assert exchange_table(prefix).to_markdown().strip() in page("ablation")


def exchange_table(prefix: str) -> Table:
    """mIoU of networks run dense and with confidence under each rule."""
    files = {"light + inplace distillation": "light_inplace", "light, longer": "light"}
    files |= {"light": "light_4000", "slim student": "slim"}
    files |= {"light, separable ASPP": "aspp", "DeepLabV3-ResNet-34 x0.375": "r34"}
    if prefix:
        files = {"light, longer": "light", "tuned, linear": "linear", "tuned, separate": "separate"}
    rows = []
    for name, file in files.items():
        own = "" if file == "light" else prefix
        ways = ways_of(f"camvid_exchange_{own}{file}", ("linear", "none", "separate"))
        rows.append({"network": name} | {row["exchange"] or row["network"]: row["miou"] for row in ways})
    keys = ("dense OS16", "separate", "none", "linear", "dense OS8")
    return Table([Column("network", "network"), *(Column(key, key, "{:.2f}") for key in keys)], rows)


def test_table_of_exchange_rules_from_scratch_is_the_result_files():
    assert scratch_table().to_markdown().strip() in page("ablation")


def scratch_table() -> Table:
    """mIoU of two networks trained selectively, each run under both rules."""
    rows = []
    for rule in ("linear", "separate"):
        ways = ways_of(f"camvid_h200_{rule}", ("linear", "separate"))
        rows.append({"trained": rule} | {row["exchange"] or row["network"]: row["miou"] for row in ways})
    titles = {"dense OS16": "dense OS16", "separate": "run under separate"}
    titles |= {"linear": "run under linear", "dense OS8": "dense OS8"}
    columns = [Column(key, title, "{:.2f}") for key, title in titles.items()]
    return Table([Column("trained", "trained under"), *columns], rows)


def test_table_of_inplace_distillation_is_the_result_files():
    assert inplace_table().to_markdown().strip() in page("results")


def inplace_table() -> Table:
    """mIoU of `light` with and without it."""
    files = {"without, seed 0": "camvid_h200_plain", "with, seed 0": "camvid_h200_inplace"}
    files |= {"with, seed 1": "camvid_h200_inplace_seed1", "with, seed 0, tuned": "camvid_light"}
    rows = []
    for name, file in files.items():
        fine, coarse, selective = (row["miou"] for row in ways_of(file, (None, "linear")))
        share = (selective - coarse) / (fine - coarse)
        rows.append({"name": name, "fine": fine, "coarse": coarse, "selective": selective, "share": share})
    titles = {"fine": "dense OS8", "coarse": "dense OS16", "selective": "confidence, f=0.15"}
    columns = [Column(key, title, "{:.2f}") for key, title in titles.items()]
    columns.append(Column("share", "accuracy share", "{:.2f}"))
    return Table([Column("name", "inplace distillation"), *columns], rows)


def _captured_table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds: medians of processor time on one thread, least wall time on two."""
    lines = []
    for row in rows:
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


def test_table_of_captured_networks_is_the_result_file():
    result = json.loads((ROOT / "docs/results/runtimes_captured.json").read_text())
    assert _captured_table(result["rows"]) in page("performance_export")
