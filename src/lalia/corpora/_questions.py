"""Questions that can only be answered by listening, from clips whose text, speaker and language are known.

A four-way question is drawn so that its text tells nothing: either the four options are drawn together from clips of one kind and
then one of them is made the right one, or the options are a fixed set and the right one is drawn before a clip is found for it.
Given the options, each is right with the same probability.
"""

from __future__ import annotations

import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lalia.data import Row

LANGUAGES = {
    "en": "English", "es": "Spanish", "fr": "French", "it": "Italian", "ru": "Russian", "de": "German", "zh": "Chinese",
    "ja": "Japanese", "pt": "Portuguese", "nl": "Dutch", "pl": "Polish", "ko": "Korean",
}  # fmt: skip
SOUNDS = ("a person speaking", "silence", "noise", "a tone")
SPEECH = SOUNDS[0]
ORDER = ("the first", "the second", "the third", "the fourth")
VOICES = ("two women", "two men", "a woman, then a man", "a man, then a woman")
WORD = re.compile(r"\w+(?:['’-]\w+)*")
LIKE = 0.34  # texts stand together as options when their numbers of words differ by at most this share
FAR_FROM_EDGE = 0.1  # clips whose length is nearer to a bound of the four ranges, as a share, are not asked about
TRIES = 200

TEMPLATES: dict[str, tuple[str, ...]] = {
    "said": ("What is said?", "Write down what you hear.", "What does the speaker say?", "Transcribe the recording."),
    "words": ("How many words are said?", "Count the words.", "How many words does the speaker say?"),
    "first": ("What is the first word?", "Which word comes first?"),
    "last": ("What is the last word?", "Which word ends the recording?"),
    "language": ("Which language is spoken?", "In what language does the speaker talk?"),
    "speaker": ("Which speaker is this?", "Whose voice is it?"),
    "sound": ("What do you hear?", "What kind of sound is this?"),
    "speech": ("Is there speech?", "Does anybody speak?"),
    "length": ("How long is the recording?", "How much time does the recording take?"),
    "gender": ("Is it a man or a woman?", "Who speaks, a man or a woman?"),
    "voices": ("Who speaks in the two recordings?", "Whose voices are in the two recordings, men's or women's?"),
    "same": ("Is it the same speaker in both recordings?", "Does one and the same person speak in both recordings?"),
    "odd": ("Three recordings are by one speaker. Which one is by another?", "Which of the four recordings has another speaker?"),
}
#: kinds that can be asked with four options, and those that are asked without
CHOICES = ("said", "words", "first", "last", "language", "speaker", "sound", "length", "voices", "odd")
OPEN = ("said", "words", "first", "last", "language", "speaker", "sound", "speech", "length", "gender", "voices", "same")


class NotEnough(ValueError):
    """The clips do not allow another question of this kind."""


@dataclass
class Item:
    """A question on one or several clips. ``options`` is empty for an open one; ``answer`` is one of them otherwise."""

    kind: str
    clips: list[Row]
    question: str
    answer: str
    options: list[str] = field(default_factory=list)


def words_of(text: str) -> list[str]:
    """Words and numbers of a text, as they are written."""
    return WORD.findall(text)


def plain(text: str) -> str:
    """Letters and digits alone, small: texts that are said alike."""
    return "".join(character for character in text.lower() if character.isalnum())


@dataclass
class Ranges:
    """Four ranges of a number with names; ``edges`` are the three bounds between them."""

    edges: list[float]
    names: list[str]
    margin: float = 0.0

    def name(self, value: float) -> str:
        """The range of ``value``; '' too near to a bound."""
        if any(abs(value - edge) < self.margin * edge for edge in self.edges):
            return ""
        return self.names[sum(value >= edge for edge in self.edges)]


def length_ranges(seconds: Sequence[float]) -> Ranges:
    """Ranges of about equally many clips, bounds in half seconds, each at least a third larger than the one before: between two
    there must be room for clips that are near neither."""
    edges = [max(0.5, round(2 * float(q)) / 2) for q in np.quantile(seconds, [0.25, 0.5, 0.75])]
    for index in (1, 2):
        edges[index] = max(edges[index], math.ceil(8 / 3 * edges[index - 1]) / 2)
    a, b, c = (f"{edge:g}" for edge in edges)
    return Ranges(edges, [f"under {a} s", f"{a} to {b} s", f"{b} to {c} s", f"over {c} s"], FAR_FROM_EDGE)


def word_ranges(counts: Sequence[int]) -> Ranges:
    """Ranges of about equally many clips by their number of words."""
    edges = [max(2.0, round(float(q))) for q in np.quantile(counts, [0.25, 0.5, 0.75])]
    for index in (1, 2):
        edges[index] = max(edges[index], edges[index - 1] + 1)
    ends = [(1, int(edges[0]) - 1), (int(edges[0]), int(edges[1]) - 1), (int(edges[1]), int(edges[2]) - 1)]
    names = [("1 word" if high == 1 else f"{low} words" if low == high else f"{low} to {high} words") for low, high in ends]
    return Ranges(edges, [*names, f"{int(edges[2])} words or more"])


class Questioner:
    """Draws questions on one set of clips (``clips``: speech; ``made``: sounds without speech, by the name of the sound)."""

    def __init__(self, clips: Sequence[Row], made: dict[str, list[Row]], lengths: Ranges, words: Ranges, seed: int) -> None:
        self.random = random.Random(seed)
        self.clips, self.made, self.lengths, self.words = list(clips), made, lengths, words
        self.by_language = _grouped(self.clips, _language)
        several = [row for row in self.clips if len(words_of(row.text)) > 1]  # a lone "dollar" may be of any language
        self.by_tongue = _grouped(several, _language)
        self.by_speaker = _grouped(self.clips, lambda row: row.speaker)
        self.by_gender = _grouped(self.clips, lambda row: str(row.extra.get("gender", "")))
        self.by_words = _grouped(self.clips, lambda row: self.words.name(len(words_of(row.text))))
        self.by_length = _grouped(self.clips, lambda row: self.lengths.name(row.duration))
        self.pools: dict[tuple[str, int | None], list[Row]] = {}  # see _pool
        self.used: set[tuple[str, ...]] = set()

    def draw(self, kind: str, choice: bool) -> Item:
        """A new question, of no clip of which it was asked before in this form. NotEnough when no clip is left for it."""
        for _ in range(TRIES):
            item = self._choice(kind) if choice else self._open(kind)
            key = (kind, str(choice), *(clip.id for clip in item.clips))
            if key not in self.used:
                self.used.add(key)
                return item
        raise NotEnough(f"{kind}: every clip that allows it has been asked about")

    # --- four options -----------------------------------------------------------------------------------------------
    def _choice(self, kind: str) -> Item:
        groups = {
            "words": self.by_words, "length": self.by_length, "language": self.by_tongue, "speaker": self.by_speaker,
        }  # fmt: skip
        if kind in groups:
            return self._grouped(kind, groups[kind])
        return getattr(self, f"_{kind}")(True)

    def _grouped(self, kind: str, groups: dict[str, list[Row]]) -> Item:
        """Four names of groups, one of them drawn, then a clip of it."""
        fixed = {"words": self.words.names, "length": self.lengths.names}.get(kind)
        names = [name for name in fixed if groups.get(name)] if fixed else sorted(groups)
        if len(names) < 4:
            raise NotEnough(f"{kind}: four groups are needed, the clips have {len(names)}")
        options = names if fixed else self.random.sample(names, 4)
        answer = self.random.choice(options)
        return self._item(kind, [self.random.choice(groups[answer])], answer, options)

    def _four(self, kind: str, text_of: Callable[[Row], str], like: bool) -> Item:
        """Four clips of one language that differ in what is asked; then one of them."""
        for _ in range(TRIES):
            seed = self.random.choice(self.clips)
            pool = self._pool(_language(seed), len(words_of(seed.text)) if like else None)
            chosen: dict[str, Row] = {}
            for row in self.random.sample(pool, min(len(pool), 40)):
                name = text_of(row)
                if name and not any(plain(name) in plain(o) or plain(o) in plain(name) for o in chosen):
                    chosen[name] = row
                if len(chosen) == 4:
                    answer = self.random.choice(list(chosen))
                    return self._item(kind, [chosen[answer]], answer, list(chosen))
        raise NotEnough(f"{kind}: no four clips of one language that differ")

    def _pool(self, language: str, words: int | None) -> list[Row]:
        """Clips of a language with texts of about so many words, None = any."""
        if (language, words) not in self.pools:
            rows = self.by_language.get(language, [])
            self.pools[language, words] = [row for row in rows if words is None or _alike(len(words_of(row.text)), words)]
        return self.pools[language, words]

    def _sound(self, choice: bool) -> Item:
        answer = self.random.choice(SOUNDS)
        pool = self.clips if answer == SPEECH else self.made.get(answer, [])
        if not pool:
            raise NotEnough(f"sound: no clip of {answer}")
        return self._item("sound", [self.random.choice(pool)], answer, list(SOUNDS) if choice else [])

    def _voices(self, choice: bool) -> Item:
        if not (self.by_gender.get("man") and self.by_gender.get("woman")):
            raise NotEnough("voices: clips of known men and women are needed (genders=speaker=man,…)")
        answer = self.random.choice(VOICES)
        pairs = (("woman", "woman"), ("man", "man"), ("woman", "man"), ("man", "woman"))
        pair = pairs[VOICES.index(answer)]
        return self._item("voices", self._pick(self.by_gender, pair), answer, list(VOICES) if choice else [])

    def _odd(self, choice: bool) -> Item:
        large = [name for name, rows in self.by_speaker.items() if len(rows) >= 3]
        if len(self.by_speaker) < 2 or not large:
            raise NotEnough("odd: two speakers are needed, one of them with three clips")
        one = self.random.choice(large)
        other = self.random.choice([name for name in sorted(self.by_speaker) if name != one])
        place = self.random.randrange(4)
        names = tuple(other if index == place else one for index in range(4))
        return self._item("odd", self._pick(self.by_speaker, names), ORDER[place], list(ORDER))

    def _said(self, choice: bool) -> Item:
        return self._four("said", lambda row: row.text, like=True)

    def _first(self, choice: bool) -> Item:
        return self._four("first", _first_word, like=False)

    def _last(self, choice: bool) -> Item:
        return self._four("last", _last_word, like=False)

    # --- open -------------------------------------------------------------------------------------------------------
    def _open(self, kind: str) -> Item:
        if kind in ("sound", "voices"):
            return getattr(self, f"_{kind}")(False)
        if kind == "same":
            return self._same()
        if kind == "speech":
            item = self._sound(False)
            return self._item("speech", item.clips, "yes" if item.answer == SPEECH else "no")
        answers: dict[str, Callable[[Row], str]] = {
            "said": lambda row: row.text,
            "words": lambda row: str(len(words_of(row.text))),
            "first": _first_word,
            "last": _last_word,
            "language": lambda row: _language(row) if len(words_of(row.text)) > 1 else "",
            "speaker": lambda row: row.speaker if len(self.by_speaker) > 1 else "",
            "length": lambda row: f"{row.duration:.1f} s",
            "gender": lambda row: str(row.extra.get("gender", "")) and f"a {row.extra['gender']}",
        }
        for _ in range(TRIES):
            row = self.random.choice(self.clips)
            answer = answers[kind](row)
            if answer:
                return self._item(kind, [row], answer)
        raise NotEnough(f"{kind}: no clip tells it")

    def _same(self) -> Item:
        large = [name for name, rows in sorted(self.by_speaker.items()) if len(rows) >= 2]
        if len(self.by_speaker) < 2 or not large:
            raise NotEnough("same: two speakers are needed, one of them with two clips")
        same = self.random.random() < 0.5
        names = (self.random.choice(large),) * 2 if same else tuple(self.random.sample(sorted(self.by_speaker), 2))
        return self._item("same", self._pick(self.by_speaker, names), "yes" if same else "no")

    # --- parts ------------------------------------------------------------------------------------------------------
    def _pick(self, groups: dict[str, list[Row]], names: Sequence[str]) -> list[Row]:
        """A clip of each named group, none twice."""
        chosen: list[Row] = []
        for name in names:
            left = [row for row in groups[name] if all(row.id != other.id for other in chosen)]
            if not left:
                raise NotEnough(f"{name} has too few clips")
            chosen.append(self.random.choice(left))
        return chosen

    def _item(self, kind: str, clips: list[Row], answer: str, options: Sequence[str] = ()) -> Item:
        shuffled = list(options)
        self.random.shuffle(shuffled)
        return Item(kind, clips, self.random.choice(TEMPLATES[kind]), answer, shuffled)


def _grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if key(row):
            groups[key(row)].append(row)
    return dict(groups)


def _language(row: Row) -> str:
    return LANGUAGES.get(row.language, row.language)


def _alike(first: int, second: int) -> bool:
    return abs(first - second) <= LIKE * max(first, second)


def _first_word(row: Row) -> str:
    words = words_of(row.text)
    return words[0].lower() if len(words) > 1 else ""


def _last_word(row: Row) -> str:
    words = words_of(row.text)
    return words[-1].lower() if len(words) > 1 else ""
