"""Calls the command line in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from lalia.cli import app


def lalia(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object, code: int = 1) -> str:
    """The message of a command that must fail with ``code`` and without a traceback."""
    result = lalia(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    if code == 1:
        assert "error: " in result.output
    return " ".join(result.output.replace("│", " ").split())
