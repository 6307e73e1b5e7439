"""What the figures mean in words, chosen by the numbers. Nothing here praises: a reader must be able to trust it."""

from __future__ import annotations

import math

from lalia.evaluate.results import RECORDING, RESYNTHESIS, SPEECH, Evaluation, Figure

CONDITION_NAMES = {RECORDING: "Recording", RESYNTHESIS: "Resynthesis", SPEECH: "Speech from text"}
WHAT_IT_IS = {
    RECORDING: "the human voice itself: the floor, what the recogniser gets wrong anyway",
    RESYNTHESIS: "recording → posterior → decoder: what the decoder can do when it is given the sound",
    SPEECH: "text → speech: the whole voice",
}
FIGURE_NAMES = {
    "wer": "Word error rate",
    "cer": "Character error rate",
    "mel_distance": "Mel distance",
    "cepstral_distortion": "Mel-cepstral distortion",
    "pitch_error": "Pitch error",
    "pitch_correlation": "Pitch correlation",
    "duration_ratio": "Length, speech / recording",
    "duration_correlation": "Length correlation",
    "rtf": "Real-time factor",
}
#: What to expect, for a reader who sees these figures for the first time. Figures without a band are absent.
BANDS = {
    "wer.recording": "studio prompts: about 4 % with Whisper-base, 30–50 % with pocketsphinx",
    "wer.resynthesis": "a trained decoder stays within a few points of the recordings",
    "wer.speech": "near 100 % after minutes on a CPU; within a few points of the recordings for a fully trained voice",
    "mel_distance": "0 is identical; trained VITS decoders log .33–.44 in training (mel loss 15–20 at weight 45)",
    "cepstral_distortion": "lower is closer; compare only with values from this tool",
    "pitch_error": "below 1 is close; 12 is an octave",
    "pitch_correlation": "1 is the recording's melody, 0 none of it",
    "duration_ratio": "0.9–1.1 is the recording's pace",
    "duration_correlation": "above 0.9 where clips differ in length",
    "rtf": "below 1 is faster than real time",
}
UNREADABLE, BROKEN_UP, WITH_ERRORS = 80.0, 40.0, 15.0


def figure_name(figure: Figure) -> str:
    kind, _, condition = figure.name.partition(".")
    return f"{FIGURE_NAMES.get(kind, kind)} · {CONDITION_NAMES.get(condition, condition).lower()}"


def band(figure: Figure) -> str:
    """The expected band of a figure, '' when there is none to give."""
    return BANDS.get(figure.name) or BANDS.get(figure.name.partition(".")[0], "")


def number(value: float, unit: str = "") -> str:
    """Three figures that matter, with the unit: ``6.24 %``, ``0.034``, ``112 %``."""
    if not math.isfinite(value):
        return "–"
    if unit == "%":
        return f"{value:.{0 if value >= 100 else 1}f} %"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 or value == 0 else 4
    return f"{value:.{digits}f}{' ' + unit if unit not in ('', 'r') else ''}"


def interval(figure: Figure) -> str:
    if not math.isfinite(figure.low):
        return "–"
    low, high = number(figure.low, figure.unit), number(figure.high, figure.unit)
    return f"{low.removesuffix(figure.unit).strip()} – {high.removesuffix(figure.unit).strip()}"


def reading(evaluation: Evaluation) -> str:
    """The three word error rates in one sentence."""
    places = {
        RECORDING: "in the recordings",
        RESYNTHESIS: "in their resynthesis",
        SPEECH: "in speech made from text",
    }
    parts = []
    for condition, place in places.items():
        figure = evaluation.figure(f"wer.{condition}")
        if figure:
            parts.append(f"{round(figure.value)} {place}")
    if not parts:
        return "No word error rate could be measured."
    joined = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    if "wer" in over_hundred(evaluation):
        return f"On every 100 words, {recogniser(evaluation)} makes {joined.replace(' ', ' errors ', 1)}."
    return f"Of 100 words, {recogniser(evaluation)} misreads {joined}."


def over_hundred(evaluation: Evaluation) -> set[str]:
    """Kinds of figures with a rate above 100 %."""
    return {f.name.partition(".")[0] for f in evaluation.figures if f.unit == "%" and f.value > 100}


def recogniser(evaluation: Evaluation) -> str:
    """The recogniser's name without what stands in brackets, as a sentence can carry it."""
    return evaluation.recogniser.partition(" (")[0]


def verdict(evaluation: Evaluation, minutes: float = 0.0) -> list[str]:
    """Paragraphs that say what this much training gives, as far as these figures can tell."""
    said = [_speech(evaluation, minutes), _resynthesis(evaluation), _caution(evaluation)]
    return [paragraph for paragraph in said if paragraph]


def _speech(evaluation: Evaluation, minutes: float) -> str:
    speech, floor = evaluation.figure(f"wer.{SPEECH}"), evaluation.figure(f"wer.{RECORDING}")
    if not speech or not floor:
        return ""
    after = f"After {minutes:.0f} minutes of training, speech" if minutes else "Speech"
    more = speech.value - floor.value
    if speech.value >= UNREADABLE:
        return (
            f"{after} from text is not intelligible yet: next to none of the words can be read. Listen for timbre and rhythm; the "
            "words are not there. So little training gives no more: the VITS paper trained for 800,000 steps."
        )
    if math.isfinite(floor.high) and speech.value <= floor.high:
        return (
            f"{after} from text is as readable to this recogniser as the recordings, within the interval. "
            "That says that the words are there; it does not say that it sounds human. Listen."
        )
    if more >= BROKEN_UP:
        return f"{after} from text is broken up: single words can be read, sentences mostly cannot."
    if more >= WITH_ERRORS:
        return f"{after} from text can be followed, with errors in many sentences."
    return f"{after} from text is readable, {more:.0f} points behind the recordings. Whether it sounds human is for the ear."


def _resynthesis(evaluation: Evaluation) -> str:
    resynthesis, floor = evaluation.figure(f"wer.{RESYNTHESIS}"), evaluation.figure(f"wer.{RECORDING}")
    if not resynthesis or not floor:
        return ""
    more = resynthesis.value - floor.value
    if math.isfinite(floor.high) and resynthesis.value <= floor.high and resynthesis.value < UNREADABLE:
        return "The decoder no longer costs words: its resynthesis is read like the recordings, within the interval."
    if more >= BROKEN_UP or resynthesis.value >= UNREADABLE:
        return "The decoder itself still loses most words, so the text side cannot be judged by these figures yet."
    return f"The decoder alone costs about {more:.0f} words in 100. What speech from text loses beyond that is the text side's."


def _caution(evaluation: Evaluation) -> str:
    clips = len(evaluation.clips)
    parts = []
    if "wer" in over_hundred(evaluation):
        parts.append("A rate above 100 % is no mistake: the recogniser also heard words that nobody said.")
    if clips < 30:
        parts.append(f"With {clips} test clips the intervals are wide; differences inside them mean nothing.")
    return " ".join(parts)
