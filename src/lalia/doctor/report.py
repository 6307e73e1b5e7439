"""What all reports of the doctor share, and how they are printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

LONGEST_LIST = 20  # lines of a list on the screen; the JSON holds all


@dataclass
class Report:
    """Base of the reports. ``problems`` end a run, ``warnings`` do not."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        return 1 if self.problems else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: every field and the exit status."""
        return {**asdict(self), "exit_status": self.exit_status}


def show(report: Report, console: Console | None = None) -> None:
    """Print a report: figures, tables of what is counted, warnings, problems, and a last line with the verdict."""
    console = console or Console()
    values = asdict(report)
    problems, warnings = values.pop("problems"), values.pop("warnings")
    figures = Table(show_header=False, box=None)
    for name, value in values.items():
        if not isinstance(value, (dict, list)):
            figures.add_row(_words(name), _text(value))
    if figures.row_count:
        console.print(figures)
    for name, value in values.items():
        if isinstance(value, (dict, list)) and value:
            console.print(f"[bold]{_words(name)}[/bold]")
            console.print(_table(value))
    for style, word, lines in (("yellow", "warning", warnings), ("red", "problem", problems)):
        for line in lines[:LONGEST_LIST]:
            console.print(f"[{style}]{word}[/{style}]: ", end="")
            console.print(line, markup=False, highlight=False)
        if len(lines) > LONGEST_LIST:
            console.print(f"… and {len(lines) - LONGEST_LIST} more")
    console.print("[red]not ready[/red]" if report.exit_status else "[green]ready[/green]")


def _table(value: Mapping[str, Any] | list[Any]) -> Table:
    rows = [{"": k, "value": v} for k, v in value.items()] if isinstance(value, Mapping) else value
    rows = [row if isinstance(row, Mapping) else {"value": row} for row in rows]
    more = f"first {LONGEST_LIST} of {len(rows)}; the JSON report has all" if len(rows) > LONGEST_LIST else None
    table = Table(caption=more, box=None)
    for column in rows[0]:
        table.add_column(_words(column), overflow="fold")
    for row in rows[:LONGEST_LIST]:
        table.add_row(*(_text(cell).replace("[", r"\[") for cell in row.values()))
    return table


def _words(name: str) -> str:
    return name.replace("_", " ")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return str(value)
