"""The command line in this process: for tests that need it hundreds of times."""

from __future__ import annotations

import sys
import time
from unittest import mock

import pytest

from edgellama.cli import main


def refused(capsys, *arguments: object) -> str:
    """Run the command; it must end soon with status 2 and one line, which is returned."""
    start = time.monotonic()
    status, out, err = command(capsys, *arguments)
    assert time.monotonic() - start < 5
    assert (status, out) == (2, ""), err
    assert err.startswith("edgellama: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    assert len(err) < 1500
    return err


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    """Run the command in this process; return its status, stdout and stderr."""
    before, sys.argv = sys.argv, ["edgellama", *map(str, arguments)]
    capsys.readouterr()
    try:
        # click leaves out what a terminal would obey, but only where there is no terminal
        with mock.patch("click.utils.should_strip_ansi", return_value=False):
            with pytest.raises(SystemExit) as end:
                main()
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, out, err
