"""The table of a cross-validation, for the terminal and as ``crossval.html``."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lalia.evaluate.emotion_report import METHOD, bars, score, spread, warning
from lalia.evaluate.page import page
from lalia.evaluate.results import Figure
from lalia.runfolder import write_atomic

if TYPE_CHECKING:
    from lalia.crossval import CrossValidation

SHORT = {"valence": "CCC-V", "arousal": "CCC-A", "dominance": "CCC-D", "mean": "CCC-Avg"}
ALL = "ALL turns, also those whose scripted sentence was trained on"


def rows_of(result: CrossValidation, suffix: str = "") -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the table: one row a fold, then mean ± sd over the folds, then pooled with its interval."""
    names = [f"{name}{suffix}" for name in (*result.dimensions, "mean") if result.figure(f"pooled.{name}{suffix}")]
    header = ["fold", *(SHORT.get(name.removesuffix(suffix), f"CCC-{name.removesuffix(suffix)}") for name in names), "turns"]
    body = []
    for fold, figures in result.folds.items():
        found = {figure.name: figure for figure in figures}
        chosen = [found.get(f"ccc.{name}") for name in names]
        body.append([fold, *(score(f.value) if f else "–" for f in chosen), _turns(chosen)])
    pooled = [result.figure(f"pooled.{name}") for name in names]
    body.append(["mean of folds ± sd", *(_plus_minus(result, name) for name in names), ""])
    body.append(["pooled (95 %)", *(f"{score(f.value)} ({spread(f)})" if f else "–" for f in pooled), _turns(pooled)])
    return header, body


def _turns(figures: Sequence[Figure | None]) -> str:
    return str(max((f.n for f in figures if f is not None), default=0))


def _plus_minus(result: CrossValidation, name: str) -> str:
    mean, deviation = result.figure(f"fold_mean.{name}"), result.figure(f"fold_sd.{name}")
    if mean is None or deviation is None:
        return "–"
    return f"{score(mean.value)} ± {score(deviation.value)}"


def text_table(result: CrossValidation) -> list[str]:
    """The tables as lines of text."""
    lines: list[str] = []
    for suffix, title in (("", ""), (".all", ALL)):
        if not any(f.name.startswith("pooled.") and f.name.endswith(suffix) for f in result.figures):
            continue
        header, body = rows_of(result, suffix)
        widths = [max(len(row[column]) for row in [header, *body]) for column in range(len(header))]
        lines += [title] if title else []
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *body]]
    return [*lines, *([result.mark] if result.mark else [])]


def write_crossval_report(path: Path, result: CrossValidation) -> None:
    """One self-contained page."""
    pooled = [f for f in result.figures if f.name.startswith("pooled.") and f.name.count(".") == 1]
    tables = [_html_table(*rows_of(result))]
    if any(f.name.endswith(".all") for f in result.figures):
        tables += [f"<h3>{html.escape(ALL)}</h3>", _html_table(*rows_of(result, ".all"))]
    audits = "".join(
        f"<h3>{html.escape(fold)}: {html.escape(part)} against test</h3><p>{html.escape(text).replace(chr(10), '<br>')}</p>"
        for fold, parts in result.audit.items()
        for part, text in parts.items()
    )
    skipped = sum(len(rows) for rows in result.skipped.values())
    lines = [
        "The mean over folds is a mean of CCCs, not the CCC of all; it says how much runs on other people differ. The pooled "
        "figure is the CCC over all folds' predictions at once.",
        *METHOD,
        *([f"{skipped} turns could not be heard and are in no figure; eval.json of each fold names them."] if skipped else []),
    ]
    body = [
        f"<h1>{html.escape(result.system)}: cross-validation, {len(result.folds)} folds</h1>",
        '<p class="soft">CCC of all folds\' predictions at once (pooled), with 95 % bootstrap intervals over dialogues</p>',
        warning(result.mark),
        bars(pooled),
        *tables,
        f"<details><summary>What test and training share, fold by fold</summary>{audits}</details>",
        "<h2>How it was measured</h2>" + "".join(f"<p>{html.escape(line)}</p>" for line in lines),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page(f"{result.system}: cross-validation", "\n".join(part for part in body if part)))


def _html_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        first = f"<{tag}>{html.escape(cells[0])}</{tag}>"
        return "<tr>" + first + "".join(f'<{tag} class="n">{html.escape(cell)}</{tag}>' for cell in cells[1:]) + "</tr>"

    return f'<div class="scroll"><table>{line(header, "th")}{"".join(line(row, "td") for row in body)}</table></div>'
