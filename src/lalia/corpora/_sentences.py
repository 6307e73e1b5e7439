"""Sentences for synthetic speech: English ones written for Lalia, free to use, varied in length, sounds and kind; and those of
given texts, of which only what can be read aloud without guessing is taken: plain words, no numbers, no abbreviations."""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lalia.corpora._common import CorpusError, Rejected, broken, lines
from lalia.corpora._documents import contents, reflow
from lalia.corpora._questions import plain

WRITTEN = """
The old lighthouse keeper counted the ships as they passed.
Why did the orchestra stop in the middle of the second movement?
Please put the blue jug on the shelf above the window.
She measured twice, cut once, and still came up short.
A fox slipped through the hedge and vanished into the wheat.
Nothing grows well in the shadow of that tall brick wall.
He whistled the same three notes all the way to the harbour.
Could you tell me which platform the night train leaves from?
The recipe calls for ginger, honey, and a pinch of salt.
Thunder rolled over the valley long before the rain began.
My grandmother kept her letters in a wooden cigar box.
If the bridge is closed, we will have to take the ferry.
What a strange and beautiful machine you have built!
The children argued about who had seen the comet first.
Every Thursday the market fills with cheese and cut flowers.
Their voices echoed down the empty marble staircase.
I would rather walk than wait another hour for the bus.
The judge adjusted her glasses and read the verdict slowly.
Fresh snow muffled every sound in the narrow street.
Only the youngest sailor knew how to read the chart.
He joined the choir because he loved the quiet before the first chord.
Measure the width of the door before you order the piano.
Two brown owls watched us from the branch of a dead oak.
The engine coughed, sputtered, and finally came to life.
You should never trust a map that has no date on it.
In the autumn, the vineyard turns the colour of rust.
Who left the garden gate open during the storm?
The teacher drew a perfect circle without any compass.
Beyond the ridge lies a village of eleven houses.
Her new shoes squeaked on the polished gymnasium floor.
The pharmacist was out of the usual brand of cough syrup.
Zebras and giraffes gathered around the shrinking pool.
It is easier to ask for forgiveness than to find the right form.
Yesterday the thermometer outside the bakery read minus twelve.
The choice between them was neither simple nor urgent.
Jewels of dew hung on the spider's web at dawn.
We mixed yellow and blue until the paint looked like moss.
The goalkeeper threw himself to the left and guessed correctly.
Vivid dreams kept the young engineer awake for a week.
Pull the lever gently, or the whole shelf will fall.
""".strip().splitlines()

SUBJECTS = (
    "the captain", "my neighbour", "a retired teacher", "the young violinist", "our guide", "the night nurse",
    "an honest merchant", "the tall gardener", "her cousin", "the village doctor", "a quiet stranger",
    "the chief editor", "one of the twins", "the museum guard", "that clever mechanic", "the busy postman",
)  # fmt: skip
ACTIONS = (
    "repaired the broken clock", "carried a basket of pears", "painted the front door green", "forgot the umbrella",
    "told a long story about whales", "wrote seven letters", "found a silver coin", "lost the key to the cellar",
    "planted three rows of onions", "bought a cheap guitar", "asked for a glass of water", "sang an old folk song",
    "drew a map of the island", "baked fresh bread", "opened the wrong envelope", "chased the goose across the yard",
)  # fmt: skip
PLACES = (
    "near the railway station", "behind the theatre", "on the north side of the river", "under the chestnut trees",
    "at the edge of the forest", "in the crowded kitchen", "beside the frozen lake", "in front of the library",
    "on the top floor", "outside the town hall", "along the sandy path", "by the light of a candle",
)  # fmt: skip
TIMES = (
    "early this morning", "just before midnight", "on the first day of March", "after the long meeting",
    "last Wednesday", "while it was raining", "every other weekend", "an hour before sunset", "at noon",
)  # fmt: skip
QUESTIONS = (
    "Did you know that {s} {a} {t}?", "Is it true that {s} {a} {p}?", "Who would have guessed that {s} {a}?",
    "Have you heard why {s} {a} {t}?",
)  # fmt: skip
STATEMENTS = (
    "{S} {a} {p}.", "{S} {a} {t}.", "{T}, {s} {a} {p}.", "We were surprised that {s} {a} {t}.",
    "I believe {s} {a}, but nobody was there to see it.", "{P}, {s} {a} {t}.", "{S} {a}.",
    "Although it was late, {s} {a} {p}, and then went home without a word.",
)  # fmt: skip
MOST_SENTENCES = 2000
SEED = 20


def sentences(count: int) -> list[str]:
    """The first ``count`` sentences, all different; a longer list begins with the shorter one."""
    if not 0 <= count <= MOST_SENTENCES:
        raise ValueError(f"there are {MOST_SENTENCES} sentences, not {count}")
    source = random.Random(SEED)
    made = dict.fromkeys(WRITTEN)  # a dict keeps the order and drops repetitions
    while len(made) < count:
        made[_fill(source)] = None
    return list(made)[:count]


def _fill(source: random.Random) -> str:
    pattern = source.choice(QUESTIONS if source.random() < 0.2 else STATEMENTS)
    subject, place, time = source.choice(SUBJECTS), source.choice(PLACES), source.choice(TIMES)
    first_big = {"S": subject.capitalize(), "P": place.capitalize(), "T": time[0].upper() + time[1:]}
    return pattern.format(s=subject, a=source.choice(ACTIONS), p=place, t=time, **first_big)


# --- of given texts ---------------------------------------------------------------------------------------------------
QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " "})
END = re.compile(r"[.!?]+[\"')\]]*(?=\s)")
ABBREVIATION = re.compile(
    r"(?:^|[^A-Za-z])(?:[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Rev|Hon|Gen|Col|Capt|etc|cf|vs|viz|pl|fig|vol|ch|pp|ed|esp)\Z", re.I
)
CAPITALS = re.compile(r"[A-ZÀ-ÖØ-ÞΑ-ΩА-Я]{2}")
WORD = r"'?[^\W\d_]+(?:['-][^\W\d_]+)*'?"
SPEAKABLE = re.compile(rf"{WORD}(?:[,;:]? {WORD})*[,;:]?[.?!]{{0,3}}")
BREAKS = 0.05  # of the lines end in the middle of a sentence that began in the middle of the line: a text of fixed width


@dataclass(frozen=True)
class Limits:
    """What is taken: so many words, and only letters of ASCII where the voice knows no others."""

    least_words: int = 3
    most_words: int = 12
    ascii_only: bool = False

    def misfit(self, sentence: str, alone: bool) -> str:
        """Why ``sentence`` is passed over, '' if it is not. ``alone``: the text is this sentence, and needs no full stop."""
        words = len(sentence.split())
        if words < self.least_words:
            return f"fewer than {self.least_words} words"
        if words > self.most_words:
            return f"more than {self.most_words} words"
        if any(character.isdigit() for character in sentence):
            return "digits"
        if _abbreviates(sentence):
            return "abbreviations or capitals"
        if not SPEAKABLE.fullmatch(sentence) or (self.ascii_only and not sentence.isascii()):
            return "other signs or letters"
        whole = sentence[-1] in ".?!" and not sentence[0].islower()
        return "" if alone or whole else "cut off by the end of a line"


def _abbreviates(sentence: str) -> bool:
    last = sentence[-1] == "." and ABBREVIATION.search(sentence[:-1])
    return bool(last or "." in sentence.rstrip(".?!") or CAPITALS.search(sentence))


@dataclass
class Found:
    """Sentences of some files by their letters and digits, each with its file, and what was passed over."""

    sentences: dict[str, tuple[str, str]] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)
    excluded: set[str] = field(default_factory=set)
    rejected: list[Rejected] = field(default_factory=list)
    texts: int = 0

    def chosen(self, count: int, seed: int) -> list[tuple[str, str]]:
        """``count`` pairs (sentence, file), or all: by a hash with the seed, so that a longer list begins with the shorter one and
        no order of files matters."""
        order = sorted(self.sentences, key=lambda key: hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest())
        return [self.sentences[key] for key in order[:count]]


def find(paths: Iterable[Path], limits: Limits, excluded: set[str]) -> Found:
    """Every sentence of the manifests and text files that can be spoken, once; those in ``excluded`` are only counted.

    Raises:
        CorpusError: a file that is missing, of another kind, or without texts.
    """
    found = Found()
    for path in paths:
        before = found.texts
        for text in texts_of(path):
            if isinstance(text, Rejected):
                found.rejected.append(text)
                continue
            found.texts += 1
            parts = sentences_of(text)
            for sentence in parts:
                _sort_in(found, sentence, limits.misfit(sentence, len(parts) == 1), path, excluded)
        if found.texts == before:
            raise CorpusError(f"{path}: nothing to speak in it; expected lines of text, or rows with a field 'text'")
    return found


def _sort_in(found: Found, sentence: str, misfit: str, path: Path, excluded: set[str]) -> None:
    key = plain(sentence)
    if misfit:
        found.passed_over[misfit] += 1
    elif key in excluded:
        found.excluded.add(key)
    elif key in found.sentences:
        found.passed_over["said already"] += 1
    else:
        found.sentences[key] = (sentence, str(path))


def excluded_texts(paths: Iterable[Path]) -> set[str]:
    """Texts that must not be spoken, as letters and digits: whole texts and their sentences. CorpusError on any doubtful line:
    what is not understood could not be kept out."""
    keys: set[str] = set()
    for path in paths:
        texts = list(texts_of(path))
        for text in texts:
            if isinstance(text, Rejected):
                raise CorpusError(f"--exclude {text.path}: {text.details}; its text could not be kept out")
            keys.update(plain(part) for part in [text, *sentences_of(text)])
        if not texts and path.stat().st_size:  # an empty file is an empty split
            raise CorpusError(f"--exclude {path}: no row has a text")
    return keys - {""}


def texts_of(path: Path) -> Iterator[str | Rejected]:
    """The texts of a manifest (``.jsonl``), those of rows, or of a text file (``.txt``): its lines, or its paragraphs where the
    lines are of a fixed width."""
    if not path.is_file():
        raise CorpusError(f"{path}: no such file")
    if path.suffix.lower() == ".jsonl":
        yield from _rows(path)
    elif path.suffix.lower() == ".txt":
        try:
            text = contents(path)[0]
        except ValueError as error:
            raise CorpusError(f"{path}: not UTF-8 ({error})") from error
        yield from (line for line in unwrapped(text).splitlines() if line.strip())
    else:
        raise CorpusError(f"{path}: texts are in manifests (.jsonl) or text files (.txt)")


def _rows(path: Path) -> Iterator[str | Rejected]:
    for number, line in lines(path):
        try:
            record = json.loads(line) if line is not None else None
        except (ValueError, RecursionError) as error:
            yield broken(path, number, str(error))
            continue
        text = record.get("text") or "" if isinstance(record, dict) else None
        if not isinstance(text, str):
            yield broken(path, number, "not UTF-8" if line is None else "expected a JSON object with a string 'text'")
        elif text.strip():
            yield text


def unwrapped(text: str) -> str:
    """Paragraphs on one line each, where line ends are those of a fixed width; else the text as it is."""
    there = [line.strip() for line in text.splitlines() if line.strip()]
    breaks = sum(bool(END.search(line)) and line[-1] not in ".?!\"')]:" for line in there[:-1])
    return reflow(text) if breaks and breaks >= BREAKS * len(there) else text


def sentences_of(text: str) -> list[str]:
    """The sentences of a text: cut after full stops and at line ends, quotation marks around them taken off."""
    text = unicodedata.normalize("NFC", text).translate(QUOTES)
    parts = (part for line in unwrapped(text).splitlines() for part in _split(line))
    return [bare for part in parts if (bare := " ".join(part.split()).strip('" ')) and plain(bare)]


def _split(line: str) -> Sequence[str]:
    """A line cut after full stops; not after an abbreviation, nor where a sentence that began with a capital goes on small."""
    parts, start = [], 0
    for end in END.finditer(line):
        following, begun = line[end.end() : end.end() + 9].lstrip()[:1], line[start : start + 9].lstrip()[:1]
        if (end[0] == "." and ABBREVIATION.search(line[start : end.start()])) or (following.islower() and begun.isupper()):
            continue
        parts.append(line[start : end.end()])
        start = end.end()
    return [*parts, line[start:]]
