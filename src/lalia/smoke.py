"""A smoke run: a few steps from random weights, judged by their losses, and the same steps with a control that must do worse.

A configuration takes part by a section ``checks`` (:class:`Checks`). The verdict is read from the runs' own ``metrics.csv``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lalia.configfile import ConfigError
from lalia.sections import Section

if TYPE_CHECKING:
    from pathlib import Path

    from lalia.sections import RunConfig

LOSS = "loss/main/total"
LAST = 5  # the end of a run is the mean of so many last steps


@dataclass
class Checks(Section):
    """What a smoke run has to show. Losses are nats a token."""

    initial: float = 0.0  # loss of the first step; 0 = not checked
    tolerance: float = 0.05
    drop: float = 0.5  # least fall of the loss from the first step to the last ones
    control: str = ""  # override that makes the control run, such as data.shuffled=true; empty = none
    margin: float = 0.0  # least lead of the run over its control at the end


@dataclass
class Verdict:
    """Figures of a smoke run, and what is wrong with them (nothing = passed)."""

    first: float
    last: float
    control: float = math.nan
    failures: list[str] = field(default_factory=list)

    def text(self) -> str:
        """A few lines for the terminal."""
        lines = [f"loss {self.first:.3f} → {self.last:.3f} (fell by {self.first - self.last:.3f})"]
        if math.isfinite(self.control):
            lines.append(f"control {self.control:.3f}: {self.control - self.last:+.3f} against the run")
        return "\n".join([*lines, *(f"FAILED: {failure}" for failure in self.failures), *([] if self.failures else ["passed"])])


def smoke(config: RunConfig, run: Path, source: Path | None = None) -> Verdict:
    """Train ``config`` in ``run`` and its control in ``run-control``, from the start each, and judge them.

    Raises ConfigError when the configuration has no ``checks`` or a run folder is already in use.
    """
    from lalia.config import load_run_config
    from lalia.data import write_json
    from lalia.train import train

    checks = getattr(config, "checks", None)
    if not isinstance(checks, Checks):
        raise ConfigError(f"a smoke run needs a section 'checks' in its configuration, which {config.system} has not")
    other = run.with_name(f"{run.name}-control")
    for folder in (run, other):
        if any(folder.glob("step-*")):
            raise ConfigError(f"{folder} has been trained in already: a smoke run starts afresh. Delete it or name another folder")
    train(config, run, source)
    if checks.control:
        train(load_run_config(run / "config.yaml", [checks.control]), other)
    verdict = judge(checks, losses(run), losses(other) if checks.control else [])
    write_json(run / "smoke.json", {**vars(verdict), "control": None if math.isnan(verdict.control) else verdict.control})
    return verdict


def losses(run: Path) -> list[float]:
    """The loss of every training step of a run; needs ``train.log_every=1``."""
    from lalia.logs import read_metrics

    rows: list[dict[str, Any]] = read_metrics(run / "metrics.csv")
    return [float(row[LOSS]) for row in rows if row["split"] == "train" and row.get(LOSS)]


def judge(checks: Checks, run: list[float], control: list[float]) -> Verdict:
    """Hold the losses of a run, and of its control where there is one, against ``checks``."""
    if len(run) < 2 * LAST:
        raise ConfigError(f"a smoke run needs the losses of {2 * LAST} steps, got {len(run)}: set train.steps, train.log_every=1")
    verdict = Verdict(run[0], mean_of_last(run), mean_of_last(control) if control else math.nan)
    found = verdict.failures
    if checks.initial and abs(verdict.first - checks.initial) > checks.tolerance:
        expected = f"{checks.initial:.3f} ± {checks.tolerance:g}"
        found.append(f"the first loss is {verdict.first:.3f}, not {expected}: {reason(verdict.first)}")
    fall = verdict.first - verdict.last
    if not fall >= checks.drop:
        found.append(f"the loss fell by {fall:.3f}, less than {checks.drop:g}")
    if checks.control and not verdict.control - verdict.last >= checks.margin:
        worse = f"it should be {checks.margin:g} worse than the run"
        found.append(f"the control ({checks.control}) ends at {verdict.control:.3f}: {worse}")
    return verdict


def mean_of_last(values: list[float]) -> float:
    return math.fsum(values[-LAST:]) / len(values[-LAST:])


def reason(first: float) -> str:
    """What a first loss away from ln(vocabulary) tells of."""
    if abs(first - math.log(320)) < 0.02:
        return "it is ln 320, so that the logits of the padded vocabulary were not cut"
    return "random logits are uniform only if the head starts near zero, and the loss is a mean over the text tokens alone"
