"""``report.html`` of an evaluation of emotion, and the parts that a cross-validation's page shares with it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from lalia.evaluate.emotion_results import CALIBRATION, EmotionEvaluation, figure_name
from lalia.evaluate.page import page
from lalia.evaluate.report import facts_section, image, losses, method_section
from lalia.evaluate.results import Figure
from lalia.logs import METRICS
from lalia.runfolder import write_atomic

#: colours of the page, in the order of the dimensions; the mean comes last
TONES = ("recording", "speech", "resynthesis")
METHOD = (
    "CCC = 2σ_xy / (σ_x² + σ_y² + (μ_x − μ_y)²) with population moments (Lin 1989), over all scored turns at once; a constant "
    "prediction gives 0. The mean is over the labelled dimensions.",
    "Intervals: percentile bootstrap, 1000 draws of dialogues. They cover the choice of dialogues. They do not cover other "
    "speakers, of whom a test set often has two, nor another training run.",
    "Levels to compare with (independent speakers, audio alone): on IEMOCAP a CCC of about .67 for arousal and .58 for valence is "
    "the published state of the art. Figures of a random split, in which speakers leak, are higher and mean something else.",
)
UNHEARD = "turns could not be heard and are in no figure; others were judged without them"


def write_emotion_report(
    out_html: str | Path, evaluation: EmotionEvaluation, run: str | Path | None = None, *, folder: str | Path | None = None
) -> Path:
    """Write one self-contained page and return its path.

    Args:
        run: run folder, for the loss curves and the training facts.
        folder: where ``eval.json`` lies, to which the calibration plot is relative; the page's own by default.
    """
    out = Path(out_html)
    title = f"{evaluation.system}{': ' + evaluation.label if evaluation.label else ''}"
    sections = [
        _head(title, evaluation),
        bars([f for f in evaluation.figures if is_headline(f)]),
        _audit(evaluation),
        _calibration((Path(folder) if folder else out.parent) / CALIBRATION),
        _few_shot(evaluation),
        _feedback(evaluation),
        losses(Path(run) / METRICS) if run else "",
        "<h2>All figures</h2>" + table(evaluation.figures),
        facts_section(evaluation, run),
        method_section(METHOD, evaluation.skipped, UNHEARD),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page(title, "\n".join(section for section in sections if section)))
    return out


def is_headline(figure: Figure) -> bool:
    """``ccc.<dimension>`` or ``ccc.mean`` without a suffix."""
    return figure.name.startswith("ccc.") and figure.name.count(".") == 1


def warning(text: str) -> str:
    return f'<p class="warn"><b>{html.escape(text)}</b></p>' if text else ""


def bars(figures: Sequence[Figure]) -> str:
    """One bar a figure with its interval, from 0 to 1."""
    return f'<div class="bars" role="list" aria-label="CCC">{"".join(_bar(f, i) for i, f in enumerate(figures))}</div>'


def _bar(figure: Figure, index: int) -> str:
    low, high = (min(1.0, max(0.0, end)) if end == end else 0.0 for end in (figure.low, figure.high))
    span = f'<span class="span" style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></span>' if high > low else ""
    width = 100 * min(1.0, max(0.0, figure.value))
    tone, interval = TONES[index % len(TONES)], spread(figure).replace(" … ", "–")
    return (
        f'<div class="bar" role="listitem"><div class="name {tone}">{html.escape(figure.name.partition(".")[2])}</div>'
        f'<div class="track {tone}"><div class="fill" style="width:{width:.2f}%"></div>{span}</div>'
        f'<div class="value"><b>{score(figure.value)}</b> <small class="soft">{interval}</small></div></div>'
    )


def score(value: float) -> str:
    """Three decimals, as CCC is given in papers; – where there is none."""
    return f"{value:.3f}" if value == value else "–"


def spread(figure: Figure) -> str:
    return f"{score(figure.low)} … {score(figure.high)}" if figure.low == figure.low else "–"


def table(figures: Sequence[Figure]) -> str:
    """All figures with their intervals and notes."""
    rows = "".join(
        f'<tr><td>{html.escape(figure_name(f))}</td><td class="n">{score(f.value)}</td><td class="n">{spread(f)}</td>'
        f'<td class="n">{f.n}</td><td class="small soft">{html.escape(f.note)}</td></tr>'
        for f in figures
    )
    head = '<tr><th></th><th class="n">value</th><th class="n">95 % interval</th><th class="n">turns</th><th></th></tr>'
    return f'<div class="scroll"><table>{head}{rows}</table></div>'


# --- sections -------------------------------------------------------------------------------------------------------
def _head(title: str, evaluation: EmotionEvaluation) -> str:
    scored = [turn for turn in evaluation.turns if turn.truth and turn.clean]
    people = len({turn.speaker for turn in scored if turn.speaker})
    dialogues = len({turn.dialogue for turn in scored})
    scope = f"{len(scored)} scored turns of {people or 'unknown'} speakers in {dialogues} dialogues"
    line = f"{scope} · 95 % bootstrap intervals over dialogues"
    lead = ", ".join(f"{f.name.partition('.')[2]} {score(f.value)}" for f in evaluation.figures if is_headline(f))
    return (
        f'<h1>{html.escape(title)}</h1><p class="soft">{html.escape(line)}</p>{warning(evaluation.mark)}'
        f'<p class="lead">Agreement with the labels (CCC): {html.escape(lead)}.</p>'
    )


def _audit(evaluation: EmotionEvaluation) -> str:
    parts = [
        f"<h3>{html.escape(name)} against test</h3><p>{html.escape(text).replace(chr(10), '<br>')}</p>"
        for name, text in evaluation.audit.items()
    ]
    if "train" not in evaluation.audit:
        parts.append("<p>The training manifests were not to be had: nothing is proved.</p>")
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in evaluation.notes)
    return f"<h2>What test and training share</h2>{''.join(parts)}{notes}"


def _calibration(picture: Path) -> str:
    if not picture.is_file():
        return ""
    caption = (
        "Each dot is a turn. Blue: the mean prediction by bins of the truth; flatter than the diagonal means that the model dares "
        "too little. Red: the mean truth by bins of the prediction (reliability); on the diagonal, a prediction means what it says."
    )
    plot = f'<img style="max-width:100%" alt="calibration" src="{image(picture)}">'
    return f"<h2>Calibration</h2><figure>{plot}<figcaption>{caption}</figcaption></figure>"


def _few_shot(evaluation: EmotionEvaluation) -> str:
    found = evaluation.few_shot
    if not found:
        return ""
    names = [*evaluation.dimensions, "mean"]
    shown = [name for name in names if evaluation.figure(f"ccc.{name}.k0")]
    rows = "".join(
        f'<tr><td>{k}</td>{"".join(_cell(evaluation.figure(f"ccc.{name}.k{k}")) for name in shown)}'
        f"{_cell(evaluation.figure(f'ccc_gain.mean.k{k}'))}</tr>"
        for k in found["shots"]
    )
    head = "".join(f'<th class="n">{html.escape(name)}</th>' for name in shown)
    text = (
        f"CCC after k labelled turns of each speaker of a dialogue, over the same {found['turns']} turns of {found['speakers']} "
        f"speakers in {found['dialogues']} dialogues for every k: those after a speaker's first {found['after']} labelled turns."
    )
    return (
        f'<h2>Personalisation</h2><p class="soft">{html.escape(text)}</p><div class="scroll"><table>'
        f'<tr><th>k</th>{head}<th class="n">gain of the mean</th></tr>{rows}</table></div>'
    )


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return '<td class="n">–</td>'
    return f'<td class="n">{score(figure.value)}<br><small class="soft">{spread(figure)}</small></td>'


def _feedback(evaluation: EmotionEvaluation) -> str:
    gap, forced, own = (evaluation.figure(name) for name in ("ccc_gap.mean", "ccc.mean.labels", "ccc.mean"))
    if gap is None or forced is None or own is None:
        return ""
    text = (
        f"The model is told its previous answers. With the true labels in their place, which no use can have, the mean CCC is "
        f"{score(forced.value)}; with its own answers, {score(own.value)}. The gap is {score(gap.value)} ({spread(gap)})."
    )
    return f"<h2>Own answers and true labels</h2><p>{html.escape(text)}</p>"


def figure_lines(evaluation: EmotionEvaluation) -> list[str]:
    """What the command prints: each figure with its interval, then what has to be known about them."""
    lines = [f"{figure_name(f):<48}{score(f.value):>8}  ({spread(f)})  {f.n} turns" for f in evaluation.figures]
    few = evaluation.few_shot
    if few:
        scope = f"{few['turns']} turns of {few['speakers']} speakers in {few['dialogues']} dialogues"
        lines.append(f"personalisation: {scope}, the same for every k")
    if evaluation.skipped:
        lines.append(f"{len(evaluation.skipped)} turns could not be heard and are in no figure (eval.json names them)")
    return [*lines, *evaluation.notes, *([evaluation.mark] if evaluation.mark else [])]
