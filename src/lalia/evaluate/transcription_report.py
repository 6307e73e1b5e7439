"""``report.html`` of an evaluation of transcription, and what its figures mean in words."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from lalia.evaluate.page import page
from lalia.evaluate.report import facts_section, image, losses, method_section
from lalia.evaluate.results import Figure
from lalia.evaluate.transcription import OTHER, REAL, SILENT, Transcript, TranscriptionEvaluation
from lalia.evaluate.wording import FIGURE_NAMES, interval, number
from lalia.logs import METRICS
from lalia.runfolder import write_atomic

SHOWN = 5  # of the worst clips, and of the typical ones
ALIGNMENT = "alignment.png"
NOTHING_SAID = 100.0  # the error rate of an empty answer
TALKS_ON, SAYS_LITTLE = 1.5, 0.5  # words said per word of the text
KINDS = {**FIGURE_NAMES, "length": "Words said / words in the text", "align": "Audio and text"}
WITH = {REAL: "with the right recordings", OTHER: "with other ones", SILENT: "with silence"}
SUFFIXES = {REAL: "right recording", OTHER: "another recording", SILENT: "silence", "cka": "CKA"}
METHOD = (
    "Texts and transcripts are compared as lower-case words without punctuation, numbers spelt out. Rates are totals over the "
    "corpus, not means over clips. They can be above 100 %: words that nobody said are errors too; saying nothing scores 100 %.",
    "Controls: “another recording” compares each text with what the system said of the next clip of another text, in the order of "
    "a hash of the ids; “silence” with what it says of silence as long as the median clip. Who does not listen is as good there.",
    "Intervals: percentile bootstrap, 1000 draws of clips. They cover the choice of clips, not another training run or other "
    "voices.",
)


def write_transcription_report(
    out_html: str | Path,
    evaluation: TranscriptionEvaluation,
    run: str | Path | None = None,
    *,
    folder: str | Path | None = None,
) -> Path:
    """Write one self-contained page and return its path.

    Args:
        run: run folder, for the loss curves and the training facts.
        folder: where ``eval.json`` and ``alignment.png`` lie; the page's own by default.
    """
    out = Path(out_html)
    title = f"{evaluation.system}{': ' + evaluation.label if evaluation.label else ''}"
    sections = [
        _head(title, evaluation),
        _figures(evaluation.figures),
        _picture((Path(folder) if folder else out.parent) / ALIGNMENT, evaluation),
        _examples(evaluation),
        losses(Path(run) / METRICS) if run else "",
        facts_section(evaluation, run),
        method_section([*METHOD, *evaluation.notes], evaluation.skipped),
        _all_clips(evaluation),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page(title, "\n".join(section for section in sections if section)))
    return out


# --- words ----------------------------------------------------------------------------------------------------------
def verdict(evaluation: TranscriptionEvaluation) -> list[str]:
    """Sentences that say whether the model listens and how much it says, as far as the figures can tell."""
    real = evaluation.figure("wer.real")
    assert real is not None, "an evaluation has clips with words"
    controls = [figure for name in (OTHER, SILENT) if (figure := evaluation.figure(f"wer.{name}"))]
    apart = bool(controls) and all(real.high < control.low for control in controls)
    rates = ", ".join(f"{WITH[f.name.partition('.')[2]]} WER {number(f.value, f.unit)}" for f in [real, *controls])
    return [_listens(real, controls, apart, rates), *_amount(evaluation.figure("length.real"))]


def _listens(real: Figure, controls: Sequence[Figure], apart: bool, rates: str) -> str:
    if real.value >= NOTHING_SAID:
        hears = "; it does hear something, the intervals are apart" if apart else ""
        return f"the model does not transcribe: {rates}; saying nothing would score 100 %{hears}"
    if apart:
        return f"the model listens: {rates}, intervals apart"
    if not math.isfinite(real.high) or not controls:
        return f"too few clips to tell whether the model listens: {rates}"
    return f"not shown that the model listens: {rates}, and the intervals overlap"


def _amount(length: Figure | None) -> list[str]:
    if length is None or SAYS_LITTLE <= length.value <= TALKS_ON:
        return []
    why = "it does not stop where the speech does" if length.value > TALKS_ON else "it stops too early"
    return [f"it says {number(length.value)} words for each word of the text: {why}"]


def figure_name(figure: Figure) -> str:
    """``Word error rate · another recording`` of ``wer.other``."""
    kind, _, suffix = figure.name.partition(".")
    return f"{KINDS.get(kind, kind)} · {SUFFIXES.get(suffix, suffix)}"


def figure_lines(evaluation: TranscriptionEvaluation) -> list[str]:
    """What the command prints: each figure with its interval, what they say, and what is missing."""
    lines = []
    for figure in evaluation.figures:
        spread = interval(figure)
        beside = f"({spread})" if spread != "–" else figure.note if figure.name.startswith("align.") else ""
        lines.append(f"{figure_name(figure):<52}{number(figure.value, figure.unit):>10}  {beside}".rstrip())
    lines += verdict(evaluation)
    if evaluation.failures():
        lines.append(f"{len(evaluation.failures())} clips could not be transcribed and count as wholly missed (eval.json says why)")
    if evaluation.skipped:
        lines.append(f"{len(evaluation.skipped)} rows could not be used and are in no figure (eval.json names them)")
    return lines + evaluation.notes


# --- sections -------------------------------------------------------------------------------------------------------
def _head(title: str, evaluation: TranscriptionEvaluation) -> str:
    clips, rows = len(evaluation.clips), evaluation.corpus_rows
    used = f"{clips} of {rows} test clips" if rows > clips else f"{clips} test clips"
    first, *more = verdict(evaluation)
    return (
        f'<h1>{_text(title)}</h1><p class="soft">{used} · 95 % bootstrap intervals over clips</p>'
        f'<p class="lead">{_text(first[0].upper() + first[1:])}.</p>'
        + "".join(f"<p>{_text(line[0].upper() + line[1:])}.</p>" for line in more)
    )


def _figures(figures: Sequence[Figure]) -> str:
    rows = "".join(
        f'<tr><td>{_text(figure_name(f))}</td><td class="n">{number(f.value, f.unit)}</td><td class="n">{interval(f)}</td>'
        f'<td class="n">{f.n}</td><td class="small soft">{_text(f.note)}</td></tr>'
        for f in figures
    )
    head = '<tr><th></th><th class="n">value</th><th class="n">95 % interval</th><th class="n">clips</th><th></th></tr>'
    return f'<h2>All figures</h2><div class="scroll"><table>{head}{rows}</table></div>'


def _picture(path: Path, evaluation: TranscriptionEvaluation) -> str:
    """The system's own picture, where this evaluation measured what it shows."""
    if not path.is_file() or not any(figure.name.startswith("align.") for figure in evaluation.figures):
        return ""
    caption = (
        "Two principal components of what the language model is given for each clip and of the embedded words of its text; lines "
        "join the two. Retrieval: how often a recording's own text is among its k nearest."
    )
    plot = f'<img style="max-width:100%" alt="projected audio and text" src="{image(path)}">'
    return f"<h2>Audio and text</h2><figure>{plot}<figcaption>{caption}</figcaption></figure>"


def _examples(evaluation: TranscriptionEvaluation) -> str:
    worst, typical = chosen(evaluation.clips)
    said = f"<p class='soft'>Of silence it says: {_quoted(evaluation.silence)}</p>" if evaluation.figure("wer.silent") else ""
    parts = [f"<h2>Worst clips</h2>{_table(worst)}"]
    if typical:
        parts.append(f"<h2>Typical clips</h2><p class='soft'>Those nearest to the median error rate.</p>{_table(typical)}")
    return "".join(parts) + said


def chosen(clips: Sequence[Transcript], count: int = SHOWN) -> tuple[list[Transcript], list[Transcript]]:
    """The ``count`` clips of the highest word error rate, worst first, and as many others round the median."""
    ordered = sorted(clips, key=lambda clip: clip.errors[REAL] / clip.words, reverse=True)
    rest = ordered[count:]
    first = min(max(0, len(ordered) // 2 - count // 2 - count), max(0, len(rest) - count))
    return ordered[:count], rest[first : first + count]


def _table(clips: Sequence[Transcript]) -> str:
    rows = "".join(
        f'<tr><td>{_text(clip.text)}<br><small class="soft">{_text(clip.id)}</small></td><td>{_heard(clip)}</td>'
        f'<td class="n">{clip.errors[REAL]} / {clip.words}</td><td class="n">{clip.seconds:.1f} s</td></tr>'
        for clip in clips
    )
    head = '<tr><th>text</th><th>transcript</th><th class="n">errors / words</th><th class="n">length</th></tr>'
    return f'<div class="scroll"><table class="clips">{head}{rows}</table></div>'


def _heard(clip: Transcript) -> str:
    return f'<span class="warn">not transcribed: {_text(clip.failure)}</span>' if clip.failure else _quoted(clip.hypothesis)


def _quoted(text: str) -> str:
    return _text(text) or '<span class="soft">(nothing)</span>'


def _all_clips(evaluation: TranscriptionEvaluation) -> str:
    return f"<details><summary>All {len(evaluation.clips)} clips</summary>{_table(evaluation.clips)}</details>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
