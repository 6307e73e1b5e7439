"""The ``emotion`` system: valence, arousal (and other dimensions) of each turn of a dialogue.

A batch without state is a set of turns; with state it is a set of whole dialogues, of which :meth:`EmotionSystem.turns` yields
one optimizer step for every ``tbptt`` turns. The state goes from stretch to stretch without its graph (truncated back-propagation
through time, Williams and Peng 1990), begins with each dialogue and ends with it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lalia import dist
from lalia.data import BadRow, Corpus, Row
from lalia.dialogues import dialogues
from lalia.nn.ccc import SUMS, Moments, ccc_loss, sums_of
from lalia.nn.ecapa import Ecapa
from lalia.pretrained import describe_ecapa, load_ecapa
from lalia.system import Clock, Emotion, System
from lalia.systems.emotion import config as settings
from lalia.systems.emotion.config import SpeechKind
from lalia.systems.emotion.data import Batch, Turn, TurnReader, collate, label_table, scaled
from lalia.systems.emotion.encoders import describe_encoder, load_weights
from lalia.systems.emotion.live import LiveDialogue
from lalia.systems.emotion.model import DialogueState, EmotionModel
from lalia.systems.emotion.personal import Personalizer
from lalia.systems.emotion.stores import prosody_statistics

log = logging.getLogger(__name__)

#: turns that are encoded at once outside training
AT_ONCE = 32
FEEDBACKS = ("own", "labels")


class CccMeter:
    """CCC of each dimension over the whole validation set, and their mean."""

    def __init__(self, dimensions: Sequence[str]) -> None:
        self.dimensions, self.moments = list(dimensions), Moments(len(dimensions), shift=0.5)

    def figures(self) -> dict[str, float]:
        values = self.moments.ccc()
        found = {f"ccc/{name}": float(value) for name, value in zip(self.dimensions, values, strict=True)}
        return found | {"ccc/mean": float(values.nanmean())}


class Rest(NamedTuple):
    """What the losses of a stretch need besides its own answers."""

    others: Tensor  # sums [D, 6] of pairs of other ranks and earlier batches
    scale: Tensor  # [D], of this part's gradient of the CCC
    labelled: Tensor  # labels in this stretch, mean over the ranks


class EmotionSystem(System):
    """See the module. ``dimensions`` names what is answered; ``autoregressive`` says whether earlier answers are heard."""

    Config = settings.Config
    best_metric = "ccc/mean"
    best_is_lower = False
    headline: ClassVar[dict[str, str]] = {
        "CCC-V": "ccc/valence",
        "CCC-A": "ccc/arousal",
        "CCC-D": "ccc/dominance",
        "CCC-Avg": "ccc/mean",
    }
    config: settings.Config
    dimensions: list[str]
    ccc_memory: Tensor

    def __init__(self, config: settings.Config, tables: Mapping[str, Any]) -> None:
        super().__init__(config, tables)
        self.dimensions = list(tables["labels"]["dimensions"])
        self.autoregressive = config.model.autoregressive
        self.reader = TurnReader(config, tables)
        self.model = EmotionModel(config.model, len(self.dimensions), tables)
        self.voice = Ecapa(**tables["voice"]).requires_grad_(False) if tables.get("voice") else None
        self.register_buffer("ccc_memory", torch.zeros(len(self.dimensions), SUMS))
        self._figures: dict[str, float | Tensor] = {}

    @classmethod
    def make_tables(cls, config: Any, rows: Any) -> dict[str, Any]:
        """The label scale with its counts, statistics of the functionals over the training rows, the encoder's architecture."""
        speech = config.model.speech
        tables: dict[str, Any] = {"labels": label_table(rows, config.labels)}
        clipped = sum(tables["labels"]["clipped"].values())
        if clipped:
            low, high = config.labels.low, config.labels.high
            log.warning("%d training labels are outside %g … %g and count as its ends", clipped, low, high)
        if config.model.prosody:
            tables["prosody"] = prosody_statistics(rows, config)
        if speech.kind is not SpeechKind.none:
            options = {"trim": speech.trim, "window_seconds": speech.window_seconds}
            tables["speech"] = describe_encoder(speech.kind.value, speech.source, **options)
        if config.model.speaker.source:
            tables["voice"] = describe_ecapa(config.model.speaker)
        return tables

    def load_external(self) -> None:
        if self.model.speech is not None:
            load_weights(self.model.speech, self.config.model.speech.source)
        if self.voice is not None:
            self.voice.load_state_dict(load_ecapa(self.config.model.speaker).state_dict())

    # --- data -------------------------------------------------------------------------------------------------------
    def reject(self, row: Row) -> str:
        if not row.audio:
            return "no audio: an emotion is heard, not read"
        if not self.config.stateful and not scaled(row.labels, self.config.labels).isfinite().any():
            return f"no label: {', '.join(self.dimensions)}"
        return ""

    def length(self, row: Row) -> float:
        """Seconds of a turn; with a state every turn counts as one, and a dialogue has as many as it has turns."""
        return 1.0 if self.config.stateful else float(row.duration)

    def sequences(self, corpus: Corpus) -> list[list[int]] | None:
        return dialogues(corpus) if self.config.stateful else None

    def prepare(self, row: Row, clock: Clock) -> Turn:
        return self.reader.read(row, keep=True)

    def collate(self, examples: Sequence[Turn]) -> Batch:
        return collate(examples, together=self.config.stateful)

    # --- hearing ----------------------------------------------------------------------------------------------------
    def hear(self, batch: Batch, chosen: Tensor) -> Tensor:
        """What is heard in the turns ``chosen`` int64 [N] of a batch, each by itself: [N, W]."""
        with self.autocast():
            prosody = batch.prosody[chosen] if batch.prosody is not None else None
            speech = self._encoded("speech", batch, chosen) if self.model.speech is not None else None
            voice = self._encoded("voice", batch, chosen) if self.voice is not None else None
            return self.model.encode(prosody, speech, voice).float()

    def _encoded(self, kind: str, batch: Batch, chosen: Tensor) -> Tensor:
        """Pooled layers or voices of the chosen turns: those known already, and the others from their waves (then kept)."""
        stored, known = (batch.speech, batch.speech_known) if kind == "speech" else (batch.voice, batch.voice_known)
        place = known.long().cumsum(0) - 1
        here = known[chosen]
        if bool(here.all()):
            return stored[place[chosen]]
        fresh = self._from_waves(kind, *self._waves(batch, chosen[~here]))
        for row, value in zip([batch.rows[i] for i in chosen[~here].tolist()], fresh, strict=True):
            # what is trained on or validated comes again; use of a run writes no file
            self.reader.stores.put(kind, row, value, keep=self.training or self.meter is not None)
        result = fresh.new_zeros(len(chosen), *fresh.shape[1:])
        if bool(here.any()):
            result = result.index_copy(0, here.nonzero()[:, 0], stored[place[chosen[here]]].to(fresh.dtype))
        return result.index_copy(0, (~here).nonzero()[:, 0], fresh)

    def _waves(self, batch: Batch, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Padded waves [N, S] and their lengths [N]."""
        starts = batch.wave_lengths.cumsum(0) - batch.wave_lengths
        lengths = batch.wave_lengths[chosen]
        parts = [batch.wave[s : s + n] for s, n in zip(starts[chosen].tolist(), lengths.tolist(), strict=True)]
        return nn.utils.rnn.pad_sequence(parts, batch_first=True), lengths

    def _from_waves(self, kind: str, waves: Tensor, lengths: Tensor) -> Tensor:
        if kind == "voice":
            assert self.voice is not None
            with torch.no_grad(), torch.autocast(waves.device.type, enabled=False):
                return self.voice.embed(waves, lengths)
        assert self.model.speech is not None
        # what is kept must be what a later use computes, in whatever precision the run learnt
        with self.autocast() if self.model.speech.tuned else torch.autocast(waves.device.type, enabled=False):
            return self.model.speech.pooled(waves, lengths)

    # --- learning ---------------------------------------------------------------------------------------------------
    def turns(self, batch: Batch, clock: Clock) -> Iterator[tuple[str, dict[str, Tensor]]]:
        stretch = self.config.model.state.tbptt
        count = -(-batch.grid.shape[1] // stretch)
        state = self.model.init(batch.grid.shape[0], batch.parties)
        for number in range(dist.most(count) if clock.training else count):
            grid = batch.grid[:, number * stretch : (number + 1) * stretch]
            party = batch.party[:, number * stretch : (number + 1) * stretch]
            shown = self._shown_labels(batch, grid, clock)
            state, rest = state.detach(), None
            while True:
                after, answers = self._answers(batch, grid, party, state, shown)
                losses, rest = self._losses(answers, batch.labels[grid[grid >= 0]], clock, rest)
                try:
                    yield "main", losses
                    break
                except torch.OutOfMemoryError as error:
                    del after, answers, losses
                    if self.model.speech is None or not self.model.speech.shrink():
                        size = self.config.data.batch_size
                        advice = f"set data.batch_size below {size} or a smaller model.state.tbptt, or leave model.speech.tuned off"
                        raise torch.OutOfMemoryError(f"{error}\nOne turn at a time does not fit: {advice}") from error
            state = after

    def _answers(
        self, batch: Batch, grid: Tensor, party: Tensor, state: DialogueState, shown: Tensor | None
    ) -> tuple[DialogueState, Tensor]:
        """A stretch of turns ``grid [B, T]`` → (state after it, answers [N, D] of its turns in the order of the grid)."""
        valid = grid >= 0
        if not bool(valid.any()):  # another rank has longer dialogues: take part without any turn
            return state, self.model.answer_bias.new_zeros(0, len(self.dimensions))
        heard = self.hear(batch, grid[valid])
        hidden = heard.new_zeros(*grid.shape, heard.shape[-1]).masked_scatter(valid[..., None], heard)
        state, answers = self.model.run(state, hidden, party, valid, shown)
        return state, answers[valid]

    def _shown_labels(self, batch: Batch, grid: Tensor, clock: Clock) -> Tensor | None:
        """Labels [B, T, D] that training feeds back instead of answers (scheduled sampling), NaN where it does not."""
        if not self.autoregressive or not clock.training:
            return None
        probability = self.config.sampling.probability(clock.step)
        chosen = (torch.rand(grid.shape, device=grid.device) < probability) & (grid >= 0)
        return torch.where(chosen[..., None], batch.labels[grid.clamp_min(0)], torch.nan)

    def _losses(
        self, answers: Tensor, labels: Tensor, clock: Clock, rest: Rest | None
    ) -> tuple[dict[str, Tensor], Rest]:
        """Losses of the answers [N, D] of a stretch, and what of them is not in it (see :meth:`_rest`), to be given again when the
        stretch is computed a second time."""
        answers, there = answers.float(), labels.isfinite()
        if isinstance(self.meter, CccMeter):
            self.meter.moments.add(answers, labels)
        rest = self._rest(sums_of(answers.detach() - 0.5, labels - 0.5), clock) if rest is None else rest
        ccc = ccc_loss(answers - 0.5, labels - 0.5, rest.others)
        ccc = ccc.detach() + rest.scale * (ccc - ccc.detach())
        errors = torch.where(there, answers - labels.nan_to_num(), torch.zeros_like(answers))
        mse = (errors**2).sum() / rest.labelled.clamp_min(1)
        untouched = 0 * self.model.answer_bias.sum()  # a graph even where there is no label
        return {"loss_ccc": ccc.mean() + untouched, "loss_mse": mse + untouched}, rest

    def _rest(self, own: Tensor, clock: Clock) -> Rest:
        """What other ranks and earlier batches add to ``own``, the sums [D, 6] of a stretch. All ranks ask, once a stretch.

        The more pairs the CCC is of, the less each moves it, and gradients are averaged over ranks: the scale makes up for both,
        so that what is learnt is the CCC of the pairs of this step, with statistics of all.
        """
        mean = dist.average(own)
        here = mean * dist.world().size
        memory = self.ccc_memory.clone() if clock.training else torch.zeros_like(here)
        if clock.training:
            self.ccc_memory.copy_(self.config.ccc_memory * (memory + here))
        scale = dist.world().size * (here + memory)[:, 0] / here[:, 0].clamp_min(1)
        return Rest(here - own + memory, scale, mean[:, 0].sum())

    def new_meter(self) -> CccMeter:
        return CccMeter(self.dimensions)

    # --- recognising ------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def recognize_emotion(
        self, dialogues: Sequence[Sequence[Row]], *, calibrate: int = 0, feedback: str = "own"
    ) -> list[list[Emotion]]:
        """See :class:`lalia.system.RecognizesEmotion`. BadRow names a row that cannot be heard."""
        if feedback not in FEEDBACKS:
            raise ValueError(f"feedback is one of {', '.join(FEEDBACKS)}, got {feedback!r}")
        if feedback == "labels" and not self.autoregressive:
            raise ValueError("feedback='labels' is for models with model.autoregressive: this one is never told an earlier answer")
        self.eval()
        return [self._recognize(list(rows), calibrate, feedback) for rows in dialogues]

    def _recognize(self, rows: list[Row], calibrate: int, feedback: str) -> list[Emotion]:
        if not rows:
            return []
        turns = [replace(turn, row=replace(turn.row, dialogue="one")) for turn in map(self._read, rows)]
        batch = collate(turns, together=True).to(next(self.parameters()).device)
        order = torch.arange(len(rows), device=batch.grid.device)
        hidden = torch.cat([self.hear(batch, part) for part in order.split(AT_ONCE)])[None]
        shown = batch.labels[batch.grid] if feedback == "labels" else None
        answers = self.model.run(self.model.init(1, batch.parties), hidden, batch.party, batch.grid >= 0, shown)[1]
        personal = Personalizer(self.config.labels, calibrate)
        return [personal.answer(row.id, row.speaker, value, row.labels) for row, value in zip(rows, answers[0].cpu(), strict=True)]

    def _read(self, row: Row) -> Turn:
        try:
            return self.reader.read(row)
        except BadRow as error:
            raise BadRow(f"row {row.id!r}: {error}") from error

    def listen(self) -> LiveDialogue:
        """A live dialogue: give it one turn after the other."""
        self.eval()
        return LiveDialogue(self)
