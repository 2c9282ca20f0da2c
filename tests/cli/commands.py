"""Commands as a user runs them."""

import re

import pytest

from sparse_seg.cli import main


def done(*arguments: object) -> None:
    """Run a command, which must succeed."""
    assert main([str(argument) for argument in arguments]) == 0


def said(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """Run a command; what it prints, or complains of where its exit code is another."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    found = capsys.readouterr()
    return found.out if code == 0 else found.err


def fails(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 1) -> str:
    """Run a command, which must fail; its one line of complaint."""
    capsys.readouterr()
    result: object
    try:
        result = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        result = stop.code
    assert result == code
    errors = capsys.readouterr().err
    lines = re.sub(r"[^\n]*\r", "", errors).strip().splitlines()
    complaints = [line for line in lines if "error:" in line]
    assert len(complaints) == 1, errors
    assert "Traceback" not in errors
    return complaints[0]
