"""``make bench`` = ``python benchmarks [NAME …]``: run all benchmarks or the named ones, print one table, write results.json.

Each compares Lalia with what one would run instead, interleaved in one process, on one thread, with the same allocator setting.
``results.json`` maps a name to ``{ratio, p10, p90, ours, theirs, against, note}``; runs of single benchmarks are merged into it.
A benchmark of quality instead of speed gives ``{variants: {name: {mean, low, high}}, note}``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).resolve().parent
NAMES = (
    "speak_vs_hf_vits", "mas_vs_pypi", "padding_waste", "train_step_parts",
    "scan_vs_mambapy", "scan_vs_transformers", "egemaps_vs_opensmile", "emotion_state",
    "decode_vs_transformers",
    "whisper_features_vs_padded", "first_token_seconds", "audiobench_mini",
)  # fmt: skip
RESULTS = FOLDER / "results.json"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones; all if absent: {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file, merged into")
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    sys.path.insert(0, str(FOLDER))  # for `python -m benchmarks` too
    console = Console()
    results: dict[str, dict[str, Any]] = {}
    for name in chosen.names or NAMES:
        with console.status(f"{name} …"):
            results |= importlib.import_module(name).run()
    merge(chosen.out, results)
    console.print(table({name: result for name, result in results.items() if "ratio" in result}))
    for name, result in results.items():
        if "variants" in result:
            console.print(variants_table(name, result["variants"]))
    for name, result in results.items():
        console.print(f"[bold]{name}[/bold]: {result['note']}", highlight=False)
    console.print(f"written to {chosen.out}", highlight=False)


def merge(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write ``results`` over what ``path`` holds of the same names; the others stay."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    merged = {**before, **results}
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(merged, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)


def table(results: dict[str, dict[str, Any]]) -> Table:
    shown = Table(title="Lalia against …  (ratio: times better)")
    for column in ("benchmark", "ratio", "p10–p90", "ours", "theirs", "against"):
        shown.add_column(column, justify="left" if column in ("benchmark", "against") else "right")
    for name, r in results.items():
        spread = f"{r['p10']:.2f}–{r['p90']:.2f}"
        shown.add_row(name, f"{r['ratio']:.2f} ×", spread, f"{r['ours']:.3g}", f"{r['theirs']:.3g}", r["against"])
    return shown


def variants_table(name: str, variants: dict[str, dict[str, float]]) -> Table:
    shown = Table(title=name)
    for column in ("variant", "mean", "low", "high"):
        shown.add_column(column, justify="left" if column == "variant" else "right")
    for variant, figures in variants.items():
        shown.add_row(variant, *(f"{figures[key]:.3f}" for key in ("mean", "low", "high")))
    return shown


if __name__ == "__main__":
    main()
