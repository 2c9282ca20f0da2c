"""The commit in result files: that of this package's checkout, or none."""

import shutil
import subprocess
from pathlib import Path

import pytest

from sparse_seg.lab import provenance as module

ROOT = Path(__file__).parents[2]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path) -> Path:
    """A repository with a commit."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def commit_of(package: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """What is recorded where the package lies there."""
    monkeypatch.setattr(module, "__file__", str(package / "sparse_seg/lab/provenance.py"))
    return module.provenance()["commit"]


def test_a_checkout_has_its_commit(repository, monkeypatch):
    shutil.copy(ROOT / "setup.cfg", repository)
    head = git(repository, "rev-parse", "--short", "HEAD")
    assert commit_of(repository, monkeypatch) == head
    (repository / "file").write_text("changed")
    assert commit_of(repository, monkeypatch) == f"{head}+"
    other = repository / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert commit_of(repository, monkeypatch) == f"{head}+", "not of the repository whose hook runs this"


def test_no_other_repository_is_taken_for_it(repository, monkeypatch):
    installed = repository / ".venv/lib/python3/site-packages"
    (installed / "sparse_seg/lab").mkdir(parents=True)
    assert commit_of(installed, monkeypatch) is None
    assert commit_of(repository, monkeypatch) is None, "a copy in somebody's project"
    copied = repository / "third_party/sparse_seg"
    copied.mkdir(parents=True)
    shutil.copy(ROOT / "setup.cfg", copied)
    assert commit_of(copied, monkeypatch) is None
