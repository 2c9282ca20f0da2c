"""What the package promises of itself in setup.cfg, requirements, CITATION.cff and CHANGELOG."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import yaml

import sparse_seg
from sparse_seg.version import __version__

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
REQUIRES = SETUP["options"]["install_requires"]
PLOTS = SETUP["options.extras_require"]["plots"]
FLOORS = dict(re.findall(r"^([\w-]+)>=([\d.]+)", f"{REQUIRES}\n{PLOTS}", re.MULTILINE))


def pinned(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(re.findall(r"^([\w-]+)==(\S+)$", "\n".join(lines), re.MULTILINE))


def test_the_oldest_versions_tested_are_those_promised() -> None:
    oldest = pinned("requirements-oldest.txt")
    assert oldest.keys() == FLOORS.keys()
    for name, floor in FLOORS.items():
        assert f"{oldest[name]}.".startswith(f"{floor}."), name


def test_make_installs_what_is_promised() -> None:
    text = (ROOT / "requirements.txt").read_text()
    for line in REQUIRES.split():
        name = re.split("[><=]", line)[0]
        assert line in text.split() or name in pinned("requirements.txt"), line


def test_python_version() -> None:
    floor = SETUP["options"]["python_requires"].removeprefix(">=")
    assert SETUP["mypy"]["python_version"] == floor
    assert f'target-version = "py{floor.replace(".", "")}"' in (ROOT / "ruff.toml").read_text()
    assert f"Python {floor} or newer" in (ROOT / "README.md").read_text()


def test_one_version() -> None:
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == __version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_types_are_published() -> None:
    assert "py.typed" in SETUP["options.package_data"]["sparse_seg"].split()
    assert (ROOT / "sparse_seg/py.typed").is_file()


def test_names_are_imported_when_they_are_asked_for() -> None:
    program = "import sys, sparse_seg; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    for name in {*sparse_seg.__all__} - {"__version__"}:
        assert sparse_seg.__getattr__(name) is getattr(sparse_seg, name)
    assert sparse_seg.__getattr__("conversion").convert
    assert not hasattr(sparse_seg, "nothing")
