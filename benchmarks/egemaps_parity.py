"""How well our eGeMAPS agrees with openSMILE's, functional by functional, on recorded speech: writes docs/egemaps.md.

Not part of the default run: it needs a manifest of recordings and the ``opensmile`` package (research licence).

    python benchmarks/egemaps_parity.py MANIFEST [--clips 500] [--output docs/egemaps.md]
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np

from lalia import audio
from lalia.data import Row, read_manifest
from lalia.egemaps import NAMES, VERSION, descriptors, functionals

GOAL, SHORTEST = 0.9, 1.0
ENDING = 5  # frames at the end of a contour that the reference smooths otherwise
INTRODUCTION = Path(__file__).with_name("egemaps_parity.md")


def choose(rows: list[Row], clips: int) -> list[Row]:
    """``clips`` rows of at least a second, as evenly over the languages as there are rows, the same every time."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.id):
        if row.duration >= SHORTEST:
            groups[row.language or ""].append(row)
    generator = random.Random(0)
    for group in groups.values():
        generator.shuffle(group)
    chosen: list[Row] = []
    while len(chosen) < clips and any(groups.values()):
        chosen += [groups[language].pop() for language in sorted(groups) if groups[language]]
    return chosen[:clips]


def compare(rows: list[Row], contours: int) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Both sides' functionals [N, 88], and by descriptor the correlation over the frames of the first ``contours`` rows."""
    import opensmile

    whole = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.Functionals)
    frames = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.LowLevelDescriptors)
    if tuple(whole.feature_names) != NAMES:
        raise SystemExit("this opensmile names or orders the functionals of eGeMAPSv02 otherwise")
    ours, theirs = [], []
    pairs: dict[str, list[np.ndarray]] = defaultdict(list)
    for index, row in enumerate(rows):
        wave, rate = audio.read(row.audio, start=row.start, duration=row.duration)
        ours.append(functionals(wave, rate))
        theirs.append(whole.process_signal(wave, rate).to_numpy()[0])
        if index < contours:
            reference = frames.process_signal(wave, rate)
            for name, values in descriptors(wave, rate).items():
                pairs[name].append(np.stack([values, reference[name].to_numpy()[: len(values)]])[:, :-ENDING])
    contour = {name: float(np.corrcoef(np.concatenate(parts, 1))[0, 1]) for name, parts in pairs.items()}
    return np.stack(ours), np.stack(theirs), contour


def correlations(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pearson correlation and median relative error of each column: [N, K] twice → [K] twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a constant column has no correlation, and says so as NaN
        pearson = np.array([np.corrcoef(ours[:, k], theirs[:, k])[0, 1] for k in range(ours.shape[1])])
    error = np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-9)
    return pearson, np.median(error, 0)


def report(ours: np.ndarray, theirs: np.ndarray, contour: dict[str, float], rows: list[Row]) -> str:
    """The text of docs/egemaps.md: the introduction and the two tables."""
    pearson, error = correlations(ours, theirs)
    above = int((pearson > GOAL).sum())
    languages = ", ".join(sorted({row.language or "?" for row in rows}))
    lowest = NAMES[int(np.nanargmin(pearson))]
    lines = [
        INTRODUCTION.read_text(encoding="utf-8").rstrip(),
        "",
        "## Measured",
        "",
        f"{len(rows)} recordings ({languages}), `{VERSION}` against openSMILE's `eGeMAPSv02`. **{above} of {len(NAMES)} "
        f"functionals correlate above {GOAL}**, {int((pearson > 0.99).sum())} above .99; the lowest is `{lowest}` with "
        f"{np.nanmin(pearson):.4f}. The median of the median relative errors is {np.median(error):.1e}.",
        "",
        "| functional | correlation | median relative error |",
        "| --- | --- | --- |",
        *(
            f"| `{name}` | {value:.4f}{'' if value > GOAL else ' (below)'} | {relative:.1e} |"
            for name, value, relative in zip(NAMES, pearson, error, strict=True)
        ),
        "",
        "Frame by frame, over the first of these recordings:",
        "",
        "| descriptor | correlation |",
        "| --- | --- |",
        *(f"| `{name}` | {value:.5f} |" for name, value in contour.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--contours", type=int, default=60, help="recordings that are compared frame by frame")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "egemaps.md")
    options = parser.parse_args()
    rows = choose(list(read_manifest(options.manifest)), options.clips)
    if not rows:
        raise SystemExit(f"{options.manifest} has no recording of {SHORTEST} s or more")
    ours, theirs, contour = compare(rows, options.contours)
    options.output.write_text(report(ours, theirs, contour, rows), encoding="utf-8")
    pearson, _ = correlations(ours, theirs)
    print(f"{int((pearson > GOAL).sum())} of {len(NAMES)} above {GOAL}; {options.output} written")


if __name__ == "__main__":
    main()
