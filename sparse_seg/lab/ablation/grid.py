"""What an ablation is made of: networks to train, ways to run them, and the cells that follow."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from sparse_seg.config import Config, check_config, key, load_config, num_classes, parse_tree, read_yaml
from sparse_seg.config.schema import COUNT, SEED
from sparse_seg.errors import CheckpointError, ConfigError, choose_one
from sparse_seg.masks import build_policy
from sparse_seg.run.build import build_model
from sparse_seg.run.way import Way
from sparse_seg.training.checkpoint import check_same_function


@dataclass
class NetworkSpec:
    """A network to train: from a config, or a copy of another one with recalibrated batch statistics."""

    config: str | None = key(None, "training config, relative to the grid's file", path=True)
    set: list[str] = field(default_factory=list)  # key=value, as --set
    teacher: str | None = None  # another network of the grid, with the same seed: train.distill.teacher
    init: str | None = None  # likewise, its weights to start from: train.init
    source: str | None = None  # another network of the grid, instead of a config
    statistics: str | None = None  # dense | selective: how to run the source for its batch statistics

    @property
    def others(self) -> list[str]:
        """Networks that must be trained before this one."""
        return [other for other in (self.teacher, self.init, self.source) if other is not None]


@dataclass
class RunsSpec:
    """Ways to run some of the networks; lists are combined."""

    networks: list[str] = field(default_factory=list)
    dense: list[int] = field(default_factory=list)  # output strides
    policies: list[str] = field(default_factory=list)  # with options, as `evaluate --policies`
    fractions: list[float] = field(default_factory=list)
    exchange: list[str] = field(default_factory=list)  # default: the config's
    strides: list[int] | None = None  # default: the config's
    middle_fraction: float | None = None  # default: the config's


@dataclass
class GridSpec:
    """The file's own keys."""

    title: str = "Ablation"
    description: str = ""
    seeds: list[int] = key([0], "of the trainings of each network", SEED)
    set: list[str] = field(default_factory=list)  # key=value for every network
    eval_images: int | None = key(None, "of the validation set; null: all", COUNT)


@dataclass(frozen=True)
class Run(Way):
    """One way to run a network, at strides of its own (px; None: the config's)."""

    strides: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """`dense OS8`, or `confidence, f=0.2, 8/16/32`: without the exchange rule."""
        way = Way(self.output_stride, self.mask, self.fine_fraction, self.middle_fraction)
        strides = "" if self.strides is None else f", {'/'.join(map(str, self.strides))}"
        return way.name.removeprefix("selective, ") + strides

    def applied(self, config: Config) -> Config:
        """The config whose model runs this way.

        Raises:
            ConfigError: settings that the network cannot run with.
        """
        if self.is_dense:
            return config
        own = config.model
        strides = own.strides if self.strides is None else list(self.strides)
        mask, exchange = self.mask_config(own.mask), self.exchange or own.exchange
        model = dataclasses.replace(own, mask=mask, strides=strides, exchange=exchange)
        result = dataclasses.replace(config, model=model)
        check_config(result)
        return result


@dataclass(frozen=True)
class Cell:
    """A trained network run one way."""

    network: str
    seed: int
    run: Run

    @property
    def slug(self) -> str:
        """A file name, one to one."""
        run = [self.run.name, self.run.exchange or ""]
        return "_".join(slug(part) for part in (self.network, f"seed{self.seed}", *run) if part)


@dataclass
class RunGrid:
    """A parsed file: `networks`, their `configs`, and all `cells`, of which the first are the baseline."""

    spec: GridSpec
    networks: dict[str, NetworkSpec]
    configs: dict[str, Config]
    runs: list[tuple[str, Run]]

    @property
    def cells(self) -> list[Cell]:
        return [Cell(name, seed, run) for name, run in self.runs for seed in self.spec.seeds]

    @property
    def trainings(self) -> list[tuple[str, int]]:
        """(network, seed) of all trainings, each after those that it needs."""
        return [(name, seed) for seed in self.spec.seeds for name in self.networks]


def slug(text: str) -> str:
    return re.sub(r"[^a-zA-Z0-9.+-]+", "-", text).strip("-")


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> RunGrid:
    """Read a grid from YAML: `GridSpec`'s keys, `networks` (name to `NetworkSpec`), `runs` (`RunsSpec` each).

    Args:
        overrides: `key=value` for every network's config, after the file's own.

    Raises:
        ConfigError: missing file, unknown key, wrong type, unknown network, or settings that exclude each
            other, naming the place.
    """
    path = Path(path)
    tree = read_yaml(path)
    network_trees, run_trees = tree.pop("networks", None), tree.pop("runs", None)
    if not isinstance(network_trees, dict) or not network_trees:
        raise ConfigError(f"{path}: 'networks' must map names to settings, at least one")
    if not isinstance(run_trees, list) or not run_trees:
        raise ConfigError(f"{path}: 'runs' must be a list of ways to run the networks, at least one")
    spec = parse_tree(GridSpec, tree, str(path))
    if len(set(spec.seeds)) < len(spec.seeds):
        raise ConfigError(f"{path}: 'seeds' must be different numbers, not {spec.seeds}")
    networks, configs = dict[str, NetworkSpec](), dict[str, Config]()
    built: list[object] = []
    for name, entry in network_trees.items():
        where = f"{path}: networks.{name}"
        network = parse_tree(NetworkSpec, entry, where)
        _check_network(network, networks, where)
        networks[str(name)] = network
        if network.source is not None:
            configs[str(name)] = configs[network.source]
        else:
            chosen = [*spec.set, *network.set, *overrides]
            configs[str(name)] = load_config(path.parent / str(network.config), chosen)
            with _named(where), torch.device("meta"):  # fail now, not when training starts
                model = configs[str(name)].model, num_classes(configs[str(name)])
                if model not in built:
                    build_model(configs[str(name)])
                    built.append(model)
                if network.init is not None:
                    check_same_function(configs[str(name)], configs[network.init], f"init {network.init}")
    if len({slug(name) for name in networks}) < len(networks):
        raise ConfigError(f"{path}: two names of networks would share a folder: {', '.join(networks)}")
    runs = list[tuple[str, Run]]()
    for number, entry in enumerate(run_trees):
        where = f"{path}: runs[{number}]"
        runs += _expand(parse_tree(RunsSpec, entry, where), configs, where)
    if len(set(runs)) < len(runs):
        double = next(run for run in runs if runs.count(run) > 1)
        raise ConfigError(f"{path}: 'runs' names {double[0]}, {double[1].name} twice")
    return RunGrid(spec, networks, configs, runs)


def _check_network(network: NetworkSpec, before: Mapping[str, NetworkSpec], where: str) -> None:
    if (network.config is None) == (network.source is None):
        raise ConfigError(f"{where}: give either 'config' or 'source'")
    if (network.source is None) != (network.statistics is None):
        raise ConfigError(f"{where}: 'source' and 'statistics' go together")
    if network.statistics not in (None, "dense", "selective"):
        raise ConfigError(f"{where}: 'statistics' must be dense or selective, not {network.statistics!r}")
    if network.source is not None and (network.set or network.teacher or network.init):
        raise ConfigError(f"{where}: a network made of another one takes no 'set', 'teacher' or 'init'")
    for other in network.others:
        if other not in before:
            raise ConfigError(
                f"{where}: network {other!r} is not defined above; networks: {', '.join(before)}"
            )


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors inside say what of the grid they are about."""
    try:
        yield
    except (CheckpointError, ConfigError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _expand(spec: RunsSpec, configs: Mapping[str, Config], where: str) -> list[tuple[str, Run]]:
    for name in spec.networks or [""]:
        if name not in configs:
            raise ConfigError(f"{where}: unknown network {choose_one(name, configs)}")
    if bool(spec.policies) != bool(spec.fractions) or not (spec.dense or spec.policies):
        raise ConfigError(f"{where}: give 'dense' output strides, or 'policies' and 'fractions', or both")
    strides = None if spec.strides is None else tuple(spec.strides)
    ways = [Run(stride) for stride in spec.dense]
    exchanges: Sequence[str | None] = spec.exchange or [None]
    for policy, fraction, exchange in itertools.product(spec.policies, spec.fractions, exchanges):
        ways.append(Run(None, policy, fraction, spec.middle_fraction, exchange, strides=strides))
    runs = list[tuple[str, Run]]()
    for name, way in itertools.product(spec.networks, ways):
        if way.output_stride not in (None, 4, 8, 16, 32):
            raise ConfigError(f"{where}: 'dense' must be of 4, 8, 16, 32, not {way.output_stride}")
        with _named(where):
            model = way.applied(configs[name]).model
            build_policy(model.mask, model.own_strides, nn.Identity())
        if not way.is_dense:  # spell out the rule: a run is the same whatever the default is
            way = dataclasses.replace(way, exchange=model.exchange)
        runs.append((name, way))
    return runs
