"""Atomic writes: whole files, parent folders, and nothing left behind on failure."""

import os
from pathlib import Path

import pytest

from sparse_seg.files import atomic_write


@pytest.mark.parametrize(("data", "content"), [(b"\x00\xff", b"\x00\xff"), ("é\n", "é\n".encode())])
def test_writes_bytes_or_text_and_creates_folders(tmp_path: Path, data: bytes | str, content: bytes) -> None:
    path = tmp_path / "new" / "folder" / "file"
    atomic_write(path, data)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_replaces_and_honours_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "file"
    previous = os.umask(0o027)
    try:
        atomic_write(path, "old")
        atomic_write(str(path), "new")
    finally:
        os.umask(previous)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_failure_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(failure)):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_name_the_file_asked_for(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        atomic_write(tmp_path, "a folder is there")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path), None)


def test_failed_encoding_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        atomic_write(tmp_path / "file", "\ud800")
    assert not list(tmp_path.iterdir())
