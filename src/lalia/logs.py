"""What a run writes down: log files, TensorBoard, ``metrics.csv``, curves, and the progress bar.

Rank 0 owns the console, TensorBoard and the table; every rank has its ``train.rankN.log``.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from torch import Tensor

from lalia.plots import curves_png
from lalia.runfolder import write_atomic

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from lalia.system import Media
    from lalia.wandb_log import WandbRun

log = logging.getLogger(__name__)

METRICS = "metrics.csv"
TRAIN, EVAL = "train", "eval"
_FIXED = ["step", "split", "epoch"]
_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
_TABLE: dict[str, Any] = {"lineterminator": "\n"}


class MetricsTable:
    """``metrics.csv``: one row for each (step, split), columns that may grow, nothing lost to a kill in the middle of
    a line.

    ``resume_step``: rows of later steps (of all steps when it is 0) are dropped: the run is about to write them again.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        self.columns = list(_FIXED)
        self._last: dict[str, str] | None = None  # the row at the end of the file, and where it starts
        self._last_start = 0
        rows = read_metrics(path) if path.is_file() else []
        if rows:
            self.columns = list(rows[0])
        self._rewrite([row for row in rows if resume_step and int(row["step"]) <= resume_step])

    def add(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Append a row. A second call for the same step and split adds to that row."""
        row = {"step": str(step), "split": split, **{name: f"{value:.8g}" for name, value in values.items()}}
        merge = self._last is not None and (self._last["step"], self._last["split"]) == (str(step), split)
        if self._last is not None and merge:
            row = {**self._last, **row}
        new = [name for name in row if name not in self.columns]
        if new:
            self.columns += new
            rows = read_metrics(self.path)
            self._rewrite((rows[:-1] if merge else rows) + [row])
            return
        with open(self.path, "r+b") as file:
            self._last_start = file.seek(self._last_start if merge else 0, io.SEEK_SET if merge else io.SEEK_END)
            file.write(self._lines([row]))
            file.truncate()
        self._last = row

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        head = _csv_line(self.columns) + self._lines(rows[:-1])
        write_atomic(self.path, head + self._lines(rows[-1:]))
        self._last, self._last_start = (rows[-1] if rows else None), len(head)

    def _lines(self, rows: list[dict[str, str]]) -> bytes:
        return b"".join(_csv_line([row.get(name, "") for name in self.columns]) for row in rows)


def _csv_line(cells: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, **_TABLE).writerow(cells)
    return text.getvalue().encode()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of a ``metrics.csv`` as written (empty string = not measured). A line that a kill cut short is left out."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(io.StringIO(whole)))
    if not lines or lines[0][: len(_FIXED)] != _FIXED:
        return []
    good = [line for line in lines[1:] if len(line) == len(lines[0]) and re.fullmatch(r"\d+", line[0])]
    if len(good) < len(lines) - 1:
        log.warning("%s: %d unreadable lines were left out", path, len(lines) - 1 - len(good))
    return [dict(zip(lines[0], line, strict=True)) for line in good]


class Logs:
    """The written record of one rank of a run; close it, or use it as a context manager.

    Call :meth:`resume_at` before the first figures when the run goes on from an earlier step. ``tracker``, where there is one, is
    told all figures and media too.
    """

    def __init__(self, run: str | os.PathLike[str], rank: int = 0) -> None:
        self.run, self.rank, self.resume_step = Path(run), rank, 0
        self.run.mkdir(parents=True, exist_ok=True)
        self._writers: dict[str, SummaryWriter] = {}
        self.tracker: WandbRun | None = None
        self.console = Console()
        self._handlers = self._attach()
        self._table: MetricsTable | None = None
        self._epoch_started = time.monotonic()

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
        for handler in self._handlers:
            for name in ("lalia", "py.warnings"):
                logging.getLogger(name).removeHandler(handler)
            handler.close()
        self._handlers.clear()
        logging.captureWarnings(False)
        if self.tracker is not None:
            self.tracker.finish(failed)
            self.tracker = None

    def flush(self) -> None:
        """Hand what TensorBoard still holds to the system; ``metrics.csv`` is always up to date."""
        for writer in self._writers.values():
            writer.flush()

    def resume_at(self, step: int) -> None:
        """The run goes on from ``step`` (0 = from the start): later entries, left by a killed run, are removed."""
        if self._table is not None or self._writers:
            raise RuntimeError("resume_at must come before the first figures are written")
        self.resume_step = step

    def scalars(self, step: int, values: Mapping[str, float | Tensor], split: str = TRAIN, epoch: int = 0) -> None:
        """Write figures of a step to TensorBoard (``eval``: to ``run/eval``) and ``metrics.csv``. Rank 0 only."""
        if self.rank != 0:
            return
        plain = to_floats(values)
        writer = self._writer(split)
        for name, value in plain.items():
            writer.add_scalar(name, value, step)
        self._open_table().add(step, split, {"epoch": epoch, **plain})
        if self.tracker is not None:
            self.tracker.scalars(step, plain, split, epoch)

    def media(self, step: int, media: Media, split: str = EVAL) -> None:
        """Pictures (uint8 [height, width, 3]), sounds (float32 [S] in [-1, 1]) and texts for TensorBoard. Rank 0 only."""
        if self.rank != 0:
            return
        writer = self._writer(split)
        for name, image in media.images.items():
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype.name != "uint8":
                raise ValueError(f"picture {name} is {image.dtype} {list(image.shape)}, not uint8 [height, width, 3]")
            writer.add_image(name, image, step, dataformats="HWC")
        for name, (wave, sample_rate) in media.audio.items():
            if wave.ndim != 1:
                raise ValueError(f"sound {name} must be [samples], got the shape {list(wave.shape)}")
            sound = torch.as_tensor(wave, dtype=torch.float32)[None].clamp(-1.0, 1.0)
            writer.add_audio(name, sound, step, sample_rate=sample_rate)
        for name, text in media.texts.items():
            writer.add_text(name, text, step)
            log.info("step %d, %s: %r", step, name, text)
        writer.flush()
        if self.tracker is not None:
            self.tracker.media(step, media, split)

    def epoch(self, epoch: int, step: int, waste: float = 0.0, lines: Sequence[str] = ()) -> None:
        """What sums up an epoch, in the log of every rank. ``waste``: share of padding in its batches."""
        now = time.monotonic()
        parts = [f"epoch {epoch}", f"step {step}", duration(now - self._epoch_started), f"padding {100 * waste:.1f}%"]
        self._epoch_started = now
        for line in [" · ".join(parts), *lines]:
            log.info("%s", line)

    def curves(self) -> list[Path]:
        """Draw ``loss_curve.png`` and ``metrics_curve.png`` from ``metrics.csv``. Rank 0 only."""
        if self.rank != 0:
            return []
        self._open_table()
        losses, metrics = curve_groups(read_metrics(self.run / METRICS))
        name = self.run.resolve().name
        return [
            curves_png(self.run / "loss_curve.png", losses, f"{name}: losses"),
            curves_png(self.run / "metrics_curve.png", metrics, f"{name}: metrics"),
        ]

    def _open_table(self) -> MetricsTable:
        if self._table is None:
            self._table = MetricsTable(self.run / METRICS, self.resume_step)
        return self._table

    def _writer(self, split: str) -> SummaryWriter:
        if split not in self._writers:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is used

            folder = self.run if split == TRAIN else self.run / split
            purge = self.resume_step + 1 if self.resume_step else None
            self._writers[split] = SummaryWriter(str(folder), purge_step=purge)
        return self._writers[split]

    def _attach(self) -> list[logging.Handler]:
        path = self.run / f"train.rank{self.rank}.log"
        handlers: list[logging.Handler] = [logging.FileHandler(path, encoding="utf-8")]
        handlers[0].setFormatter(_FORMAT)
        if self.rank == 0 and self.console.is_terminal:
            handlers.append(RichHandler(console=self.console, show_path=False, markup=False))
        elif self.rank == 0:
            handlers.append(logging.StreamHandler(sys.stdout))
            handlers[-1].setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        for name in ("lalia", "py.warnings"):
            for handler in handlers:
                logging.getLogger(name).addHandler(handler)
        logging.getLogger("lalia").setLevel(logging.INFO)
        logging.captureWarnings(True)
        return handlers


def to_floats(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Numbers of scalars that may live on a device, copied from it in one go."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    copied: dict[str, float] = {}
    if tensors:
        stacked = torch.stack([value.detach().double().reshape(()) for value in tensors.values()])
        copied = dict(zip(tensors, stacked.tolist(), strict=True))
    return {name: copied[name] if name in copied else float(value) for name, value in values.items()}


def curve_groups(rows: list[dict[str, str]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(losses, metrics), each panel → label → (steps, values). Numbered parts (``loss/d_r/3``) are for TensorBoard."""
    losses: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    for name in rows[0] if rows else []:
        if name in _FIXED or re.search(r"[/_]\d+$", name):
            continue
        for split in sorted({row["split"] for row in rows}, reverse=True):
            points = [(int(row["step"]), float(row[name])) for row in rows if row["split"] == split and row[name]]
            if points:
                steps, values = zip(*points, strict=True)
                panels = losses if name.startswith("loss") else metrics
                panels.setdefault(_panel_of(name), {})[f"{name.rpartition('/')[2]} ({split})"] = (steps, values)
    return losses, metrics


def _panel_of(name: str) -> str:
    """Name of the panel a column is drawn in: figures of the same kind together, everything else alone."""
    if name.startswith("grad_norm"):
        return "grad_norm"
    return name.rpartition("/")[0] or name


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def peak_memory() -> float:
    """Highest memory use so far in GiB: of the CUDA device when one is in use, else of this process (0 if unknown)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _figures(values: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in values.items())


class Progress:
    """How far a run is: a bar on a terminal, otherwise one line about every ``interval`` seconds.

    The run ends at ``total_steps`` or after ``minutes``, whichever comes first (0 = no limit). Pass ``enabled=False``
    on ranks other than 0.
    """

    def __init__(
        self,
        total_steps: int = 0,
        minutes: float = 0.0,
        enabled: bool = True,
        console: Console | None = None,
        interval: float = 10.0,
    ) -> None:
        self.total_steps, self.minutes, self.enabled, self.interval = total_steps, minutes, enabled, interval
        self.console = console or Console()
        self._started = time.monotonic()
        self._said = -math.inf
        self._recent: deque[tuple[float, int, float]] = deque(maxlen=64)  # (time, step, audio seconds so far)
        self._fields: dict[str, float | Tensor] = {}
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        if enabled and self.console.is_terminal:
            columns = (BarColumn(bar_width=24), TextColumn("{task.fields[line]}"))
            self._bar = RichProgress(*columns, console=self.console, refresh_per_second=4)
            self._task = self._bar.add_task("training", total=1.0, line="")
            self._bar.start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(
        self, step: int, audio_seconds: float | None = None, waste: float | None = None, **fields: float | Tensor | None
    ) -> None:
        """After a step, or with news of one. Fields stay on show until they change; tensors are read only when shown.

        ``audio_seconds``: trained on so far, in total; ``waste``: share of padding in the batches.
        """
        if not self.enabled:
            return
        now = time.monotonic()
        self._fields.update({name: value for name, value in fields.items() if value is not None})
        if waste is not None:
            self._fields["padding"] = waste
        if not self._recent or step != self._recent[-1][1]:
            before = self._recent[-1][2] if self._recent else 0.0
            self._recent.append((now, step, before if audio_seconds is None else audio_seconds))
        if now - self._said >= (0.25 if self._bar else self.interval) or step == self.total_steps:
            self._said = now
            self._show(self._line(now, step), self.fraction(now, step))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def fraction(self, now: float, step: int) -> float:
        """Share of the run that is done, in [0, 1]; 0 when the run has no limit."""
        by_step = step / self.total_steps if self.total_steps else 0.0
        by_time = (now - self._started) / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_step, by_time))

    def remaining(self, now: float, step: int) -> float | None:
        """Seconds to go at the present speed; None when unknown."""
        limits = []
        rate = self._rates()[0]
        if self.total_steps and rate > 0:
            limits.append((self.total_steps - step) / rate)
        if self.minutes:
            limits.append(60 * self.minutes - (now - self._started))
        return max(0.0, min(limits)) if limits else None

    def _rates(self) -> tuple[float, float]:
        """(steps/s, audio seconds/s) over the last steps; zeros before the second one."""
        if not self._recent:
            return 0.0, 0.0
        (then, step, audio), (now, last_step, last_audio) = self._recent[0], self._recent[-1]
        elapsed = now - then
        return ((last_step - step) / elapsed, (last_audio - audio) / elapsed) if elapsed > 0 else (0.0, 0.0)

    def _line(self, now: float, step: int) -> str:
        steps, audio = self._rates()
        left = self.remaining(now, step)
        fields = to_floats(self._fields)
        padding = fields.pop("padding", None)
        parts = [f"step {step}" + (f"/{self.total_steps}" if self.total_steps else "")]
        parts += [f"{100 * self.fraction(now, step):.0f}%"] if self.total_steps or self.minutes else []
        parts += [f"ETA {duration(left)}"] if left is not None else []
        parts += [f"{steps:.2f} steps/s"] if steps else []
        parts += [f"{audio:.1f} audio-s/s"] if audio else []
        parts += [f"peak {peak_memory():.1f} GiB"]
        parts += [f"padding {100 * padding:.1f}%"] if padding is not None else []
        return " · ".join([*parts, _figures(fields)] if fields else parts)

    def _show(self, line: str, fraction: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=fraction, line=line)
        else:
            print(line, file=self.console.file, flush=True)
