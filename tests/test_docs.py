"""Tables in the docs are those of the result files, and every path that the docs name exists."""

import ast
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_seg
from sparse_seg.config import load_config, model_config
from sparse_seg.config.docs import render
from sparse_seg.lab.ablation.report import ablation_table
from sparse_seg.lab.benchmark.measure import COLUMNS
from sparse_seg.lab.compare.report import comparison_table
from sparse_seg.lab.report.tables import Column, Table, table
from sparse_seg.networks.encoder_decoder import build_module
from sparse_seg.run.network import SelectiveNetwork

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
# Columns of an ablation's table where there is little room.
SHORT = (
    *("network", "run", "miou", "parameters_m", "gmacs", "milliseconds", "peak_mib"),
    *("parameters_share", "gmacs_share", "milliseconds_share"),
)


def measured(name: str) -> dict[str, Any]:
    result = json.loads((ROOT / f"docs/results/{name}.json").read_text())
    assert {"command", "machine", "date"} <= set(result)
    assert "commits" in result or "commit" in result
    return result


def page(name: str) -> str:
    return (ROOT / f"docs/{name}.md").read_text()


def speed_table(name: str) -> Table:
    shown = ("network", "form", "milliseconds", "spread", "gmacs", "speedup", "mac_ratio", "peak_mib")
    return table(measured(name)["rows"], [key for key in COLUMNS if key in shown])


def runtimes_table() -> Table:
    """Of each network and run, on one thread and on two: ms, ratio to dense OS8, time share and lift.

    Merge `patch` and OpenVINO's dense OS16 are left out; the page gives the former in words."""
    kinds = {"fine": "dense OS8", "coarse": "dense OS16", "selective": "selective"}
    rows = dict[tuple[str, str], dict[str, Any]]()
    for network, files in RUNTIMES.items():
        for row in (row for file in files for row in measured(f"runtimes_{file}")["runtimes"]):
            if row["run"] == "coarse openvino" or row["run"].endswith("patch"):
                continue
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


def masks_table() -> Table:
    """By policy, with exchange `linear`: mIoU of two networks at four fractions."""
    lines, titles = dict[str, dict[str, Any]](), list[str]()
    for network, file in (("R34", "camvid_r34_masks"), ("R18", "camvid_masks")):
        rows = measured(file)["rows"]
        assert {row["images"] for row in rows} == {101}
        titles += [f"{network}, f={fraction}" for fraction in (0.1, 0.15, 0.2, 0.3)]
        for row in (row for row in rows if row["exchange"] == "linear"):
            line = lines.setdefault(row["policy"], {"policy": row["policy"]})
            line[f"{network}, f={row['fine_fraction']:g}"] = row["miou"]
    columns = [Column("policy", "policy"), *(Column(title, title, "{:.2f}") for title in titles)]
    return Table(columns, list(lines.values()))


def gain_table() -> Table:
    """Where mIoU lies between dense OS16 (0) and dense OS8 (1), at f = 0.15 and 0.2."""
    files = {"light + inplace distillation": "camvid_h200_gain", "light": "camvid_light_gain"}
    files |= {"ResNet-18 x0.625, lite": "camvid_h100_r18_gain"}
    files |= {"DeepLabV3-ResNet-34 x0.375": "camvid_h100_r34_gain"}
    ways = [f"{policy}, {merge}" for policy in ("confidence", "gain") for merge in ("whole", "patch")]
    lines = []
    for network, file in files.items():
        miou = {row["network"].removeprefix("selective, "): row["miou"] for row in measured(file)["rows"]}
        coarse, fine = miou["dense OS16"], miou["dense OS8"]
        line = {"network": network, "dense OS16, OS8": f"{coarse:.2f}, {fine:.2f}"}
        for way in ways:
            policy, merge = way.split(", ")
            scores = [miou[f"{policy}, f={fraction}, {merge}"] for fraction in (0.15, 0.2)]
            line[way] = " / ".join(f"{(score - coarse) / (fine - coarse):.2f}" for score in scores)
        lines.append(line)
    columns = [Column(key, key) for key in ("network", "dense OS16, OS8", *ways)]
    return Table(columns, lines)


def costs_of_each_size() -> Table:
    """The baseline, and the best light network of each size with linear exchange and f = 0.15."""
    rows = measured("ablation_camvid")["rows"]
    light = [row for row in rows if row["network"] in ("student + detail", "slim student + detail")]
    ways = [("dense OS8", None), ("confidence, f=0.15", "linear")]
    shown = [row for row in rows if row["network"] == "baseline"]
    shown += [row for row in light if (row["run"], row["exchange"]) in ways]
    return ablation_table(shown, SHORT)


def by_run(name: str) -> Table:
    """mIoU, the mean and in brackets the seeds: a line per network, a column per way to run a light one.

    Of networks trained dense, on two strides (those trained selectively stand in another table), and of no
    copies that differ from their network by recalibrated statistics alone."""
    rows = [row for row in measured(name)["rows"] if not row["network"].endswith("statistics")]
    if name == "ablation_camvid":
        rows = [row for row in rows if "selective" not in row["network"] and "8/16/32" not in row["run"]]
    light = {row["run"] for row in rows if not row["network"].startswith("baseline")}
    lines, runs = dict[str, dict[str, Any]](), dict[str, None]()
    for row in sorted((row for row in rows if row["run"] in light), key=lambda row: not row["dense"]):
        run = row["run"].removeprefix("confidence, ")
        run += f", {row['exchange']}" if row["exchange"] in ("none", "nearest") else ""
        lines.setdefault(row["network"], {"network": row["network"]})[run] = mean_and_seeds(row)
        runs[run] = None
    return Table([Column(key, key) for key in ("network", *runs)], list(lines.values()))


def mean_and_seeds(row: dict[str, Any]) -> str:
    return f"{row['miou']:.2f} ({', '.join(f'{miou:.2f}' for miou in row['mious'])})"


def auto_table() -> Table:
    left_out = ("dense OS8, torch", "auto, before")
    rows = [row for row in measured("predict_auto")["rows"] if row["run"] not in left_out]
    columns = [Column(count, f"{count} images", "{:.1f}") for count in ("1", "10", "30", "300")]
    return Table([Column("run", "run"), *columns], rows)


def unseen_table() -> Table:
    """Dense runs, and the default fraction of the others, which score alike."""
    columns = [column for column in comparison_table([]).columns if column.key != "milliseconds"]
    rows = [row for row in measured("street_lite0_unseen")["rows"] if row["fine_fraction"] in (None, 0.15)]
    return Table(columns, rows)


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


def ways_of(file: str, exchanges: tuple[str | None, ...]) -> list[dict[str, Any]]:
    """The rows of a comparison that are dense, and with confidence, f = 0.15, under these rules."""
    rows = [row for row in measured(file)["rows"] if row.get("merge") != "patch"]
    wanted = [("confidence", 0.15, exchange) for exchange in exchanges]
    return [
        row
        for row in rows
        if not row["policy"] or (row["policy"], row["fine_fraction"], row["exchange"]) in wanted
    ]


def letters_table() -> Table:
    """Parameters, multiply-adds and accuracy of each network, dense and selective."""
    rows = list[dict[str, Any]]()
    for name, (file, epochs, config, changes) in LONGER.items():
        changed = [f"model.{change}" for change in changes.split()]
        with torch.device("meta"):
            network = build_module(model_config(load_config(ROOT / f"configs/{config}.yaml", changed)), 8)
        millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        fine, coarse, selective = ways_of(file, (None, "linear"))
        mious = {"coarse": coarse["miou"], "selective": selective["miou"], "fine": fine["miou"]}
        costs = {"cost": selective["gmacs"], "fine_cost": fine["gmacs"]}
        rows.append({"network": name, "epochs": epochs, "parameters": millions} | mious | costs)
    titles = {"parameters": "M params", "coarse": "dense OS16", "selective": "f=0.15", "fine": "dense OS8"}
    titles |= {"cost": "GMACs, f=0.15", "fine_cost": "GMACs, dense OS8"}
    columns = [Column("network", "network"), Column("epochs", "epochs")]
    columns += [Column(key, title, "{:.2f}") for key, title in titles.items()]
    return Table(columns, rows)


def exchange_table() -> Table:
    """mIoU of networks trained dense, run dense and with confidence under each rule."""
    files = {"light + inplace distillation": "light_inplace", "light, longer": "light", "light": "light_4000"}
    files |= {"slim student": "slim", "light, separable ASPP": "aspp", "DeepLabV3-ResNet-34 x0.375": "r34"}
    rows = []
    for name, file in files.items():
        ways = ways_of(f"camvid_exchange_{file}", ("linear", "none", "separate"))
        rows.append({"network": name} | {row["exchange"] or row["network"]: row["miou"] for row in ways})
    keys = ("dense OS16", "separate", "none", "linear", "dense OS8")
    return Table([Column("network", "network"), *(Column(key, key, "{:.2f}") for key in keys)], rows)


def captured_lines() -> str:
    """Milliseconds: medians of processor time on one thread, least wall time on two."""
    lines = []
    for row in measured("runtimes_captured")["rows"]:
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


TABLES: list[tuple[str, Callable[[], Table | str]]] = [
    ("performance", functools.partial(speed_table, "bench_r50")),
    ("performance", functools.partial(speed_table, "bench_r50_train")),
    ("performance_export", runtimes_table),
    ("performance_export", auto_table),
    ("performance_export", captured_lines),
    ("masks", masks_table),
    ("masks", gain_table),
    ("ablation", costs_of_each_size),
    ("ablation", functools.partial(by_run, "ablation_camvid")),
    ("ablation", functools.partial(by_run, "ablation_camvid_long")),
    ("ablation", functools.partial(by_run, "ablation_camvid_ways")),
    ("ablation", exchange_table),
    ("results", unseen_table),
    ("results", letters_table),
]


@pytest.mark.parametrize(("name", "made"), TABLES)
def test_a_table_is_that_of_the_result_files(name: str, made: Callable[[], Table | str]):
    table = made()
    assert (table if isinstance(table, str) else table.to_markdown().strip()) in page(name)


def test_readme_is_short():
    assert README.count("\n") <= 125


def test_scores_of_the_network_trained_on_cpus_are_the_result_file():
    rows = {row["network"]: row for row in measured("camvid_r18")["rows"]}
    for name in ("dense OS8", "dense OS16", "selective, edge, f=0.1"):
        assert f"{rows[name]['miou']:.2f}" in page("results")


def test_table_of_three_strides_is_the_result_file():
    rows = {row["run"]: row for row in measured("ablation_camvid_strides")["rows"]}
    text = page("masks").partition("## Three strides")[2]
    lines = re.findall(r"^\| (confidence.*?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert lines
    for run, *values in lines:
        row = rows[run]
        assert values == [f"{row['miou']:.2f}", f"{row['gmacs']:.2f}", f"{row['milliseconds']:.1f}"]


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


def test_page_of_config_keys_is_the_schema():
    assert page("config") == render(), "run: python -m sparse_seg.config.docs > docs/config.md"


def test_the_frame_before_scores_as_the_page_says():
    """How far `previous` lies from `confidence` at each speed and fraction."""
    differences = []
    for pan in (0, 8, 32):
        rows = {
            (row["policy"], row["fine_fraction"]): row for row in measured(f"previous_scenes_{pan}")["rows"]
        }
        for fraction in (0.1, 0.15, 0.2):
            found = [rows[policy, fraction]["miou"] for policy in ("previous", "confidence")]
            differences.append(abs(found[0] - found[1]))
    assert f"within {max(differences):.2f} points" in " ".join(page("masks").split())


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
