"""The training loop: plain, resumable at any step, the same for every system.

Each step is a pure function of (weights, optimizer state, seed, step): the random state is set anew from (seed, step, rank) before
it, and the loader's batches are a function of (seed, epoch, position). A checkpoint therefore holds weights, optimizer state and
four counters, and nothing else can be forgotten.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from lalia import checkpoint, dist, optim, run_setup, wandb_log
from lalia.checkpoint import RunFolder
from lalia.counters import Counters, Window
from lalia.logs import Logs, Progress
from lalia.run_setup import Interrupt, NonFinite, Setup
from lalia.sections import RunConfig
from lalia.system import Clock, loss_weights

log = logging.getLogger("lalia.train")


class Trainer:
    """One run in one process (of possibly several). ``fit()`` returns the counters at its end."""

    def __init__(self, config: RunConfig, run: RunFolder, setup: Setup, logs: Logs, counters: Counters) -> None:
        self.config, self.run, self.logs, self.counters = config, run, logs, counters
        self.world, self.system, self.optimizers = setup.world, setup.system, setup.optimizers
        self.train_loader, self.valid_loader, self.ema = setup.train_loader, setup.valid_loader, setup.ema
        self.weights = loss_weights(config)
        self.guard = NonFinite(config.train, run.path, self.world)
        self.window, self.epoch_window = Window(), Window()
        self.metrics: dict[str, float] = {}
        self.saved_step = counters.step if counters.step else -1
        self.started = self.saved_at = time.monotonic()
        self.seconds_before = counters.seconds

    # --- the loop ---------------------------------------------------------------------------------------------------
    def fit(self) -> Counters:
        c, t = self.counters, self.config.train
        if c.step == 0:
            self._save(best=False)
        bar = Progress(t.steps, t.minutes, self.world.is_main)
        with contextlib.closing(self.train_loader), Interrupt() as interrupt, bar as progress:
            while not self._finished(interrupt):
                for batch in self.train_loader.batches(c.epoch, c.position, c.step):
                    self._step(batch, progress)
                    if self._finished(interrupt):
                        break
                if c.position >= self.train_loader.count(c.epoch):
                    self._end_epoch()
        c.interrupted = asked = self._any_rank(interrupt.asked)
        improved = not asked and self._evaluate()
        if improved or self.saved_step != c.step:
            self._save(best=improved)
        self.logs.curves()
        if asked:
            log.warning("stopped at step %d and saved; the same command goes on from there", c.step)
        return c

    def _finished(self, interrupt: Interrupt) -> bool:
        """Ranks leave the loop together: what one wants at this step, all do."""
        c, t = self.counters, self.config.train
        over = t.minutes > 0 and (time.monotonic() - self.started) / 60 >= t.minutes
        done = bool(t.steps and c.step >= t.steps) or bool(t.epochs and c.epoch >= t.epochs)
        return self._any_rank(done or over or interrupt.asked or 0 < t.patience <= c.stale)

    def _any_rank(self, flag: bool) -> bool:
        return flag if self.world.size == 1 else bool(dist.average(float(flag)) > 0)

    def _step(self, batch: Any, progress: Progress) -> None:
        c = self.counters
        clock = Clock(self.config.train.seed, c.step, c.epoch, self.config.train.steps)
        run_setup.seed_step(clock, self.world.rank)
        rates = optim.set_learning_rates(self.optimizers, self.config, c.step, c.epoch, self.config.train.steps)
        self.system.train()
        self._turns(batch.to(self.world.device), clock)
        self.window.add({"learning_rate": [*rates.values()][-1]} | {f"learning_rate_{n}": rate for n, rate in rates.items()})
        c.step, c.position = c.step + 1, c.position + 1
        c.seconds = self.seconds_before + time.monotonic() - self.started
        c.audio_seconds += run_setup.audio_seconds(self.system, batch)
        if self.ema is not None:
            self.ema.update(c.step)
        self._housekeeping(progress)

    def _turns(self, batch: Any, clock: Clock) -> None:
        """One pass of the system's generator."""
        turns = iter(self.system.turns(batch, clock))
        turn = next(turns, None)
        while turn is not None:
            turn = self._learn(turns, *turn, batch.ids, clock)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self.window.add(self.system.scalars())

    def _learn(self, turns: Iterator[Any], name: str, losses: dict[str, Tensor], ids: list[str], clock: Clock) -> Any:
        """One turn: weigh, back-propagate, average, clip, step. Returns the next turn, None after the last."""
        optimizer = self.optimizers[name]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        figures = run_setup.turn_figures(name, losses, self.weights)
        total = figures[f"loss/{name}/total"]
        if total.requires_grad:  # not every loss of this turn is switched off
            optimizer.zero_grad(set_to_none=True)
            lost = run_setup.backward(total)
            if lost is not None:
                del total  # with the losses, the last to hold the graph: it must be gone before the turn is computed again
                figures.clear()
                losses.clear()
                optimizer.zero_grad(set_to_none=True)
                return turns.throw(lost)  # type: ignore[attr-defined]  # the same turn in smaller parts, or the error again
            dist.average_gradients(parameters, self.config.dist.bucket_mb)
            norm = optim.clip_gradients(parameters, optim.section(self.config, name).clip)
            figures[f"grad_norm_{name}"] = norm
            if self.guard.check(name, total, norm, losses, ids, clock):
                optimizer.step()
            else:
                self.counters.skipped += 1
        self.window.add(figures)
        self.epoch_window.add({"loss": total})
        return next(turns, None)

    def _end_epoch(self) -> None:
        c, every = self.counters, self.config.train.eval_epochs
        waste, ended = self.train_loader.waste(c.epoch), c.epoch
        c.epoch, c.position = c.epoch + 1, 0
        improved = bool(every) and c.epoch % every == 0 and self._evaluate()
        self.epoch_window.empty_into(c)
        loss = c.epoch_loss / max(1, c.epoch_turns)
        self.logs.epoch(ended, c.step, waste, run_setup.epoch_lines(self.system, loss, self.metrics))
        c.epoch_loss, c.epoch_turns = 0.0, 0
        if improved:
            self._save(best=True)

    # --- logs, evaluation, checkpoints --------------------------------------------------------------------------------
    def _housekeeping(self, progress: Progress) -> None:
        c, t = self.counters, self.config.train
        progress.update(c.step, c.audio_seconds, self.train_loader.waste(c.epoch))
        if c.step % max(1, t.log_every) == 0:
            means = self.window.means()
            progress.update(c.step, **{k.removeprefix("loss/"): v for k, v in means.items() if k.endswith("/total")})
            self.logs.scalars(c.step, {**means, "skipped": c.skipped, "hours": c.seconds / 3600}, epoch=c.epoch)
        improved = bool(t.eval_every) and c.step % t.eval_every == 0 and self._evaluate()
        late = t.save_minutes > 0 and (time.monotonic() - self.saved_at) / 60 >= t.save_minutes
        due = bool(t.save_every) and c.step % t.save_every == 0
        if improved or due or (t.save_minutes > 0 and self._any_rank(late)):
            self._save(best=improved)
        if t.weights_every and c.step % t.weights_every == 0 and self.world.is_main:
            checkpoint.save_weights(self.run, c.step, self._inference_weights())

    def _evaluate(self) -> bool:
        """Validate on rank 0 while the others wait on a barrier of its own; True when the best metric improved. Once a step."""
        c, improved = self.counters, False
        if c.evaluated_at == c.step:
            return False
        c.evaluated_at = c.step
        if self.valid_loader is not None:
            averaged = self.ema.swapped() if self.ema is not None else contextlib.nullcontext()
            with dist.alone(), averaged:  # what is measured is what model.safetensors will hold
                self.metrics = run_setup.validate(self.system, self.valid_loader, self.config, self.weights, self.logs, c.step)
            self.logs.scalars(c.step, self.metrics, "eval", epoch=c.epoch)
            value = self.metrics.get(self.system.best_metric, math.nan)
            sign = 1 if self.system.best_is_lower else -1
            improved = math.isfinite(value) and (c.best is None or sign * value < sign * c.best)
            if improved:
                c.best, c.best_step = value, c.step
            c.stale = 0 if improved else c.stale + 1
        dist.wait_for_main("evaluate", self.config.dist.eval_timeout_seconds)
        improved, c.best, c.best_step, c.stale = dist.broadcast_object((improved, c.best, c.best_step, c.stale))
        return improved

    def _inference_weights(self) -> dict[str, Tensor]:
        raw = self.system.state_dict()
        return {**raw, **self.ema.state()} if self.ema is not None else raw

    def _save(self, best: bool) -> None:
        """One atomic set. ``model.safetensors`` is what inference uses; with an average, the raw weights go to the state."""
        self.saved_at, self.saved_step, c = time.monotonic(), self.counters.step, self.counters
        self.epoch_window.empty_into(c)
        if self.world.is_main:
            state = {"counters": asdict(c), "optimizers": optim.optimizer_state(self.optimizers)}
            if self.ema is not None:
                state["raw"] = self.system.state_dict()
            meta = {"system": self.config.system, "epoch": c.epoch, "metrics": self.metrics, "seconds": c.seconds}
            checkpoint.save_set(self.run, c.step, self._inference_weights(), state, meta, best=best)
            checkpoint.prune(self.run, self.config.train.keep)
        dist.wait_for_main("save", self.config.dist.eval_timeout_seconds)


def resume(config: RunConfig, run: RunFolder, setup: Setup) -> Counters:
    """Take up the newest whole set of the run folder, or begin at step 0 (from ``train.init_from`` when it is given)."""
    found = checkpoint.latest_set(run, repair=setup.world.is_main)
    if found is None:
        run_setup.initial_weights(config, setup.system)
        if setup.ema is not None:
            setup.ema.load_state(setup.system.state_dict())
        return Counters()
    state, model = found.state(), found.model()
    setup.system.load_state_dict(state.get("raw", model))
    if setup.ema is not None:
        setup.ema.load_state(model)
    if config.train.skip_optimizer:
        log.warning("train.skip_optimizer: optimizers start afresh; the learning rate stays where the schedule is")
    else:
        optim.load_optimizer_state(setup.optimizers, state["optimizers"])
    counters = Counters(**state["counters"])
    log.info("going on from %s: epoch %d, batch %d", found.path.name, counters.epoch, counters.position)
    return counters


def train(config: RunConfig, run_path: str | Path, source: str | Path | None = None) -> Counters:
    """Train ``config`` in the folder ``run_path``, or go on where that folder stands.

    ``source`` is the configuration file, of which the folder gets a copy. Raises RunLocked when another process trains
    there, DamagedCheckpoint, ConfigError, ManifestError, NonFiniteLoss, WandbError.
    """
    wandb_log.require(config.train)
    world = dist.start(config.dist, config.train.device)
    run = RunFolder(run_path)
    try:
        if world.is_main:
            run.create()
            run.lock()
        dist.wait_for_main("lock")
        with Logs(run.path, world.rank) as logs:
            setup = run_setup.prepare_run(config, run, world, source)
            counters = resume(config, run, setup)
            logs.resume_at(counters.step)
            dist.wait_for_main("setup")  # it has more to do than the others, and a collective would not wait so long
            dist.assert_same_weights(setup.system)
            logs.tracker = wandb_log.begin(config, run.path) if world.is_main else None
            result = Trainer(config, run, setup, logs, counters).fit()
            dist.wait_for_main("end")
            dist.assert_same_weights(setup.system)
        return result
    finally:
        run.unlock()
        dist.stop()
