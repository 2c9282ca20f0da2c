"""Reading a grid: what it expands to, and what is refused."""

from pathlib import Path

import pytest

from sparse_seg.config import Config, model_config
from sparse_seg.errors import ConfigError
from sparse_seg.lab.ablation.grid import Run, load_grid
from sparse_seg.networks.encoder_decoder import build_module
from tests.ablation.conftest import GRID

BUILT = set[str]()


@pytest.fixture
def uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each network is built once, and not captured."""

    def build(config: Config) -> None:
        settings = model_config(config)
        if str(settings) not in BUILT:
            build_module(settings, 8)
            BUILT.add(str(settings))

    monkeypatch.setattr("sparse_seg.lab.ablation.grid.build_model", build)


def test_a_grid_expands_to_trainings_and_cells(grid_file: Path) -> None:
    path = grid_file.with_name("seeds.yaml")
    path.write_text(GRID.replace("seeds: [1]", "seeds: [0, 1]"))
    grid = load_grid(path, ["train.lr=0.5"])
    names = ["baseline", "student", "taught", "student again", "tuned"]
    assert grid.trainings == [(name, seed) for seed in (0, 1) for name in names]
    assert len(grid.cells) == 2 * (4 + 4 + 2 + 1)
    assert grid.cells[0].run == Run(output_stride=8)
    assert [cell.seed for cell in grid.cells[:2]] == [0, 1]
    assert len({cell.slug for cell in grid.cells}) == len(grid.cells)
    assert grid.networks["taught"].others == ["baseline"]
    assert grid.networks["student again"].others == grid.networks["tuned"].others == ["student"]
    assert grid.configs["student"].model.width == 0.0625
    assert grid.configs["student"].train.lr == 0.5
    assert grid.configs["student again"] == grid.configs["student"]


def test_a_run_changes_mask_exchange_and_strides_alone(grid_file: Path) -> None:
    grid = load_grid(grid_file)
    config = grid.configs["student"]
    run = grid.cells[-1].run
    applied = run.applied(config)
    assert applied.model.strides == [8, 16, 32]
    assert (applied.model.mask.fine_fraction, applied.model.mask.middle_fraction) == (0.25, 0.5)
    assert applied.model.exchange == "linear", "the config's"
    assert (applied.train, applied.data) == (config.train, config.data)
    assert config.model.own_strides == [8, 16]
    spec = Run(None, "confidence:margin,mean", 0.1, exchange="none").applied(config).model
    assert (spec.mask.uncertainty, spec.mask.reduce, spec.exchange) == ("margin", "mean", "none")
    assert Run(output_stride=16).applied(config) is config
    assert run.name == "edge, f=0.25+0.5, 8/16/32"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: Tiny", "titel: Tiny", "unknown key 'titel'; did you mean 'title'?"),
        ("seeds: [1]", "seeds: [0, 0]", "'seeds' must be different numbers"),
        ("seeds: [1]", "seeds: []", "seeds has 0 values"),
        ("seeds: [1]", "seeds: [-1]", "seeds is [-1]; each must lie in [0, 4294967295]"),
        ("seeds: [1]", "seeds: [0]\neval_images: 0", "eval_images is 0; it must lie in [1, 1e9]"),
        ("seeds: [1]", "seeds: [a]", "'seeds', item 1, must be a whole number"),
        ("teacher: baseline", "teacher: taught", "network 'taught' is not defined above"),
        ("teacher: baseline", "teecher: baseline", "networks.taught: unknown key 'teecher'"),
        ("config: tiny.yaml, set", "config: tony.yaml, set", "tony.yaml does not exist; did you mean"),
        ("model.width=0.0625]}", "model.widht=0.0625]}", "did you mean 'model.width'?"),
        ("statistics: selective", "statistics: sparse", "must be dense or selective, not 'sparse'"),
        (", statistics: selective", "", "'source' and 'statistics' go together"),
        ("{source: student,", "{source: student, config: tiny.yaml,", "give either 'config' or 'source'"),
        ("{source: student,", "{source: student, teacher: baseline,", "takes no 'set', 'teacher' or 'init'"),
        ("init: student", "init: later", "network 'later' is not defined above"),
        (
            "init: student",
            "init: baseline",
            "init baseline does not fit the config: it was trained with model.width 0.125, not 0.0625",
        ),
        (
            "[student, taught]",
            "[student, tought]",
            "unknown network 'tought'; did you mean 'taught'? Choose one of baseline, student, taught,",
        ),
        ("dense: [8, 16]", "dense: [8, 12]", "'dense' must be of 4, 8, 16, 32, not 12"),
        ("fractions: [0, 1]", "fractions: [0, 2]", "fine_fraction is 2"),
        (", policies: [random], fractions: [0, 1]", ", policies: [random]", "'policies' and 'fractions'"),
        ("policies: [random]", "policies: [rendom]", "unknown mask policy 'rendom'"),
        ("exchange: [none, linear]", "exchange: [none, cubic]", "model.exchange is 'cubic'"),
        ("strides: [8, 16, 32]", "strides: [8, 32]", "model.strides is [8, 32]"),
        ("model.width=0.0625]}", "model.width=0.06]}", "networks.student: model: width 0.06 makes 3.84"),
        ("policies: [edge]", "policies: [uniform]", "uniform policy takes fine_fraction 0 or 1, not 0.25"),
        ("middle_fraction: 0.5", "middle_fraction: 0.9", "must add up to 1 at most"),
        ("exchange: [none, linear]", "exchange: [none, none]", "names student, edge, f=0.25 twice"),
    ],
)
def test_refused_grids(
    grid_file: Path, tmp_path: Path, uncaptured: None, old: str, new: str, message: str
) -> None:
    assert old in GRID
    path = grid_file.parent / f"bad_{tmp_path.name}.yaml"  # beside the config that it names
    path.write_text(GRID.replace(old, new, 1))
    with pytest.raises(ConfigError) as error:
        load_grid(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["title: x", "networks: {}\nruns: []", "networks: [a]\nruns: [b]", "[1, 2]"])
def test_files_of_another_form(tmp_path: Path, text: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"networks|keys and values"):
        load_grid(path)


def test_shipped_grids_are_valid(uncaptured: None) -> None:
    for path in sorted((Path(__file__).parents[2] / "configs/ablation").glob("*.yaml")):
        grid = load_grid(path)
        assert grid.cells[0].run.output_stride == 8, "ratios refer to a dense network"
        assert len(grid.cells) == len(grid.runs) * len(grid.spec.seeds)
    assert BUILT
