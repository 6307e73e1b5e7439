"""``report.html``: one file with sound, pictures, curves and figures that can be opened anywhere, offline, for years."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile

from lalia import checkpoint
from lalia.evaluate import svg, wording
from lalia.evaluate.page import page
from lalia.evaluate.results import CONDITIONS, RESYNTHESIS, SPEECH, ClipResult, ConditionResult, Evaluation, Figure
from lalia.logs import METRICS, curve_groups, duration, read_metrics
from lalia.runfolder import write_atomic

UNUSED = "rows could not be used and are in no figure"

EXAMPLES = 8
LONGEST_EXAMPLE = 9.0  # seconds; longer clips make a page that no phone opens
CHARTS = 12
CHART_ORDER = ("mel", "kl", "dur", "total")


def write_report(
    out_html: str | Path,
    evaluations: Evaluation | Sequence[Evaluation],
    run: str | Path | None = None,
    *,
    folder: str | Path | None = None,
    facts: Mapping[str, str] | None = None,
    pictures: Mapping[str, str | Path] | None = None,
    title: str = "",
    minutes: float = 0.0,
) -> Path:
    """Write one self-contained page and return its path.

    Args:
        evaluations: one, or several of the same clips in the order of training; the last is the one that is shown.
        run: run folder, for the loss curves and the training facts.
        folder: where the last evaluation's ``eval.json`` lies, to which its files are relative; the page's own by default.
        facts: more lines for the table of training facts, name → text.
        pictures: more pictures, caption → .png or .jpg file.
        minutes: training time, for the wording; taken from the run when 0.

    Raises:
        ValueError: no evaluation.
    """
    given = [evaluations] if isinstance(evaluations, Evaluation) else list(evaluations)
    if not given:
        raise ValueError("a report needs at least one evaluation")
    last, out = given[-1], Path(out_html)
    training, run_minutes = run_facts(Path(run)) if run else ({}, 0.0)
    title = title or f"{last.system}{': ' + last.label if last.label else ''}"
    sections = [
        _head(title, last),
        _result(last, minutes or run_minutes),
        _history(given),
        _examples(last, Path(folder) if folder else out.parent),
        losses(Path(run) / METRICS) if run else "",
        _pictures(pictures or {}),
        _figures(last),
        _facts({**training, **(facts or {})}, last),
        _method(last),
        _all_clips(last),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page(title, "\n".join(section for section in sections if section)))
    return out


def _head(title: str, last: Evaluation) -> str:
    clips, rows = len(last.clips), last.corpus_rows
    used = f"{clips} of {rows} test clips" if rows > clips else f"{clips} test clips"
    line = f"{used} · recogniser {last.recogniser} · 95 % bootstrap intervals over clips"
    return f'<h1>{_text(title)}</h1><p class="soft">{_text(line)}</p>'


def _result(last: Evaluation, minutes: float) -> str:
    rates = {c: f for c in CONDITIONS if (f := last.figure(f"wer.{c}"))}
    ends = [end for f in rates.values() for end in (f.value, f.high) if end == end]
    widest = max([100.0, *ends])
    bars = "".join(_bar(condition, figure, widest) for condition, figure in rates.items())
    paragraphs = "".join(f"<p>{_text(p)}</p>" for p in wording.verdict(last, minutes))
    heading = "What these minutes give" if minutes else "What this gives"
    return (
        f'<p class="lead">{_text(wording.reading(last))}</p>'
        f'<div class="bars" role="list" aria-label="word error rates">{bars}</div>'
        f"<h2>{heading}</h2>{paragraphs}"
    )


def _bar(condition: str, figure: Figure, widest: float) -> str:
    share = 100 / widest
    has_span = figure.low == figure.low and figure.high > figure.low
    span = (
        f'<span class="span" style="left:{figure.low * share:.2f}%;width:{(figure.high - figure.low) * share:.2f}%"></span>'
        if has_span
        else ""
    )
    return (
        f'<div class="bar" role="listitem"><div class="name {condition}" title="{_text(wording.WHAT_IT_IS[condition])}">'
        f"{wording.CONDITION_NAMES[condition]}</div>"
        f'<div class="track {condition}"><div class="fill" style="width:{figure.value * share:.2f}%"></div>{span}</div>'
        f'<div class="value"><b>{wording.number(figure.value, figure.unit)}</b> '
        f'<small class="soft">{wording.interval(figure)}</small></div></div>'
    )


def _history(given: Sequence[Evaluation]) -> str:
    if len(given) < 2:
        return ""
    names = [f"wer.{c}" for c in CONDITIONS] + [f"mel_distance.{c}" for c in (RESYNTHESIS, SPEECH)]
    shown = [(name, f) for name in names if (f := given[-1].figure(name))]
    head = "".join(f'<th class="n">{_text(wording.figure_name(f))}</th>' for _, f in shown)
    rows = "".join(
        f"<tr><td>{_text(e.label or str(i + 1))}</td>" + "".join(_cell(e.figure(name)) for name, _ in shown) + "</tr>"
        for i, e in enumerate(given)
    )
    note = (
        "The same clips each time." if len({tuple(c.id for c in e.clips) for e in given}) == 1 else "The clips differ between rows."
    )
    table = f'<div class="scroll"><table><tr><th></th>{head}</tr>{rows}</table></div>'
    return f'<h2>How the figures moved</h2><p class="soft">{note}</p>{table}'


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return '<td class="n">–</td>'
    return (
        f'<td class="n">{wording.number(figure.value, figure.unit)}<br><small class="soft">{wording.interval(figure)}</small></td>'
    )


# --- examples ---------------------------------------------------------------------------------------------------------------
def _examples(last: Evaluation, folder: Path) -> str:
    short = [c for c in last.clips if max(r.seconds for r in c.conditions.values()) <= LONGEST_EXAMPLE]
    chosen = (short or last.clips)[:EXAMPLES]
    cards = "".join(_card(clip, folder) for clip in chosen)
    return (
        f"<h2>Listen</h2><p class='soft'>The first {len(chosen)} test clips of at most {LONGEST_EXAMPLE:.0f} s in the order of "
        "a hash of their ids, so not picked by ear. The three mel pictures of a clip share one colour scale (70 dB under the "
        "recording's loudest "
        f"part), one time scale and 0–8 kHz.</p>{cards}"
    )


def _card(clip: ClipResult, folder: Path) -> str:
    longest = max(result.seconds for result in clip.conditions.values()) or 1.0
    columns = "".join(
        _column(name, clip.conditions[name], clip.words, longest, folder) for name in CONDITIONS if name in clip.conditions
    )
    alignment = ""
    if clip.alignment and (folder / clip.alignment).is_file():
        alignment = (
            f'<figure class="align"><img alt="alignment of text and recording" src="{image(folder / clip.alignment)}">'
            "<figcaption>Alignment that the training finds: time to the right, text upwards</figcaption></figure>"
        )
    voice = " · ".join(part for part in (clip.speaker, clip.language) if part)
    quote = f'<blockquote>{_text(clip.text)} <small class="soft">{_text(voice)}</small></blockquote>'
    return f'<article class="card">{quote}<div class="trio">{columns}</div>{alignment}</article>'


def _column(name: str, result: ConditionResult, words: int, longest: float, folder: Path) -> str:
    head = f'<div class="name {name}">{wording.CONDITION_NAMES[name]} <small class="soft">{result.seconds:.1f} s</small></div>'
    if result.failure:
        return f'<div>{head}<p class="warn small">No sound: {_text(result.failure)}</p></div>'
    player = f'<audio controls preload="metadata" src="{_sound(folder / result.wave)}"></audio>'
    picture = (
        f'<div class="mel"><img style="width:{100 * result.seconds / longest:.1f}%" alt="mel spectrogram, {name}" '
        f'src="{image(folder / result.picture)}"></div>'
    )
    heard = f"“{_text(result.hypothesis)}”" if result.hypothesis else "nothing"
    count = f"{result.word_errors} of {words} words wrong" if result.word_errors else "all words right"
    if result.word_errors > words:
        count = f"{result.word_errors} errors on {words} words"
    return f'<div>{head}{player}{picture}<p class="heard">heard: {heard}<br><small class="soft">{count}</small></p></div>'


def _sound(path: Path) -> str:
    """A file's sound as a data URI: wav, mono, 16 bit."""
    wave, rate = soundfile.read(str(path), dtype="int16", always_2d=True)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave[:, 0], rate, format="WAV", subtype="PCM_16")
    return f"data:audio/wav;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image(path: Path) -> str:
    """A picture file as a data URI."""
    kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _pictures(given: Mapping[str, str | Path]) -> str:
    figures = "".join(
        f'<figure><img alt="{_text(caption)}" src="{image(Path(path))}"><figcaption>{_text(caption)}</figcaption></figure>'
        for caption, path in given.items()
    )
    return f'<h2>Pictures from training</h2><div class="pictures">{figures}</div>' if figures else ""


# --- curves and tables ------------------------------------------------------------------------------------------------------
def losses(path: Path) -> str:
    """The curves of a run's ``metrics.csv``, as HTML; '' without any."""
    if not path.is_file():
        return ""
    panels, _ = curve_groups(read_metrics(path))
    charts: dict[str, dict[str, svg.Points]] = {}
    for panel, lines in panels.items():
        for label, points in lines.items():
            name, _, split = label.rpartition(" (")
            charts.setdefault(f"{panel}/{name}" if panel != name else name, {})[split.rstrip(")")] = points
    order = sorted(charts, key=_chart_rank)[:CHARTS]
    drawn = []
    for name in order:
        picture = svg.curves({split: charts[name][split] for split in sorted(charts[name], reverse=True)}, name)
        if picture:
            drawn.append(f"<figure><h3>{_text(name)}</h3>{picture}</figure>")
    if not drawn:
        return ""
    key = '<p class="key small"><span class="recording"><i></i>training</span><span class="speech"><i></i>validation</span></p>'
    left = (
        f'<p class="soft small">{len(charts) - len(order)} more losses are in metrics.csv.</p>' if len(charts) > len(order) else ""
    )
    return f'<h2>Losses</h2>{key}<div class="charts">{"".join(drawn)}</div>{left}'


def _chart_rank(name: str) -> tuple[int, str]:
    words = re.split(r"[/_]", name)
    return next((i for i, wanted in enumerate(CHART_ORDER) if wanted in words), len(CHART_ORDER)), name


def _figures(last: Evaluation) -> str:
    rows = "".join(
        f'<tr><td>{_text(wording.figure_name(f))}</td><td class="n">{wording.number(f.value, f.unit)}</td>'
        f'<td class="n">{wording.interval(f)}</td><td class="n">{f.n}</td>'
        f'<td class="small">{_text(wording.band(f))}{_note(f)}</td></tr>'
        for f in last.figures
    )
    return (
        '<h2>All figures</h2><div class="scroll"><table><tr><th></th><th class="n">value</th><th class="n">95 % interval</th>'
        f'<th class="n">clips</th><th>what to expect, how measured</th></tr>{rows}</table></div>'
    )


def _note(figure: Figure) -> str:
    return f'<br><span class="soft">{_text(figure.note)}</span>' if figure.note else ""


def run_facts(run: Path) -> tuple[dict[str, str], float]:
    """What the newest checkpoint of a run tells, and the minutes of training."""
    found = checkpoint.latest_set(run)
    if found is None:
        return {}, 0.0
    seconds = float(found.meta.get("seconds", 0.0))
    facts = {"Run": run.resolve().name, "Steps": f"{found.step:,}", "Epochs": str(found.meta.get("epoch", ""))}
    if seconds:
        facts["Training time"] = f"{duration(seconds)} ({seconds / max(1, found.step):.2f} s a step)"
    facts["Source"] = str(found.meta.get("git", ""))
    return {name: value for name, value in facts.items() if value}, seconds / 60


def _facts(training: Mapping[str, str], last: Evaluation) -> str:
    model = {
        "System": last.system,
        "Parameters": f"{last.parameters:,} (all networks, also those that only train)" if last.parameters else "",
        "Sample rate": f"{last.sample_rate:,} Hz" if last.sample_rate else "",
        "Evaluation took": duration(last.seconds),
    }
    return f"<h2>Training and machine</h2><dl>{terms({**model, **training, **last.machine}.items())}</dl>"


def facts_section(evaluation: Any, run: str | Path | None) -> str:
    """Training and machine, of any evaluation that holds ``system``, ``parameters``, ``corpus_rows``, ``seconds``, ``machine``."""
    facts = {
        "System": evaluation.system,
        "Parameters": f"{evaluation.parameters:,}" if evaluation.parameters else "",
        "Test rows": f"{evaluation.corpus_rows:,}",
        "Evaluation took": duration(evaluation.seconds),
        **(run_facts(Path(run))[0] if run else {}),
        **evaluation.machine,
    }
    return f"<h2>Training and machine</h2><dl>{terms(facts.items())}</dl>"


def method_section(lines: Sequence[str], skipped: Mapping[str, str], about: str = UNUSED) -> str:
    """How it was measured, a paragraph a line, and what was left out: ``about`` says why."""
    told = [*lines, *([f"{len(skipped)} {about}:"] if skipped else [])]
    listed = f'<dl class="small">{terms(skipped.items())}</dl>' if skipped else ""
    return "<h2>How it was measured</h2>" + "".join(f"<p>{_text(line)}</p>" for line in told) + listed


def terms(items: Iterable[tuple[str, str]]) -> str:
    """The body of a ``<dl>``; items without a value are left out."""
    return "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in items if value)


def _method(last: Evaluation) -> str:
    lines = [
        f"Texts and transcripts are compared as lower-case words without punctuation, numbers spelt out. {last.recogniser} heard "
        "all conditions under the same settings; its errors on the recordings are part of every rate. Rates are totals over the "
        "corpus, not means over clips.",
        "Intervals: percentile bootstrap, 1000 draws of clips. They cover the choice of clips, not another training run, voice or "
        "recogniser.",
        "Mel distance: mean absolute difference of 80-band log-mels at 16 kHz, 12.5 ms hop, natural log of magnitudes (1 neper = "
        "8.7 dB); the resynthesis frame by frame, speech along a dynamic time warping path. Warping hides errors of timing, which "
        "the length figures show. Pitch: YIN, over frames voiced in both.",
        "Real-time factors are of one clip at a time on the machine named above, after one call to warm up.",
    ]
    failed = [f"{len(last.failures(c))} without {c}" for c in (RESYNTHESIS, SPEECH) if last.failures(c)]
    if failed:
        lines.append(f"Clips for which the system gave no sound: {', '.join(failed)}. They count as wholly wrong.")
    return method_section(lines, last.skipped)


def _all_clips(last: Evaluation) -> str:
    shown = [c for c in CONDITIONS if any(c in clip.conditions for clip in last.clips)]
    head = "".join(f"<th>{wording.CONDITION_NAMES[c]}</th>" for c in shown)
    rows = "".join(
        f"<tr><td>{_text(clip.text)}<br><small class='soft'>{_text(clip.id)}</small></td>"
        + "".join(_heard(clip.conditions.get(c), clip.words) for c in shown)
        + "</tr>"
        for clip in last.clips
    )
    return (
        f"<details><summary>What was heard in all {len(last.clips)} clips</summary>"
        f'<div class="scroll"><table class="clips"><tr><th>text</th>{head}</tr>{rows}</table></div></details>'
    )


def _heard(result: ConditionResult | None, words: int) -> str:
    if result is None:
        return "<td>–</td>"
    if result.failure:
        return f'<td class="warn">no sound: {_text(result.failure)}</td>'
    return f"<td>{_text(result.hypothesis) or '(nothing)'}<br><small class='soft'>{result.word_errors} / {words}</small></td>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
