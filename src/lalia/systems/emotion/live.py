"""A live dialogue: one turn in, one answer out, the state kept between. The answers are those about the whole recording."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from lalia import audio
from lalia.data import Row
from lalia.system import Emotion
from lalia.systems.emotion.data import SAMPLE_RATE, checked, collate
from lalia.systems.emotion.personal import Personalizer

if TYPE_CHECKING:
    from lalia.systems.emotion.system import EmotionSystem


class LiveDialogue:
    """See :class:`lalia.system.EmotionSession`. A speaker who was not heard before begins with a fresh state of their own."""

    def __init__(self, system: EmotionSystem) -> None:
        self.system = system
        self.speakers: dict[str, int] = {}
        self.state = system.model.init(1, 0)
        self.personal = Personalizer(system.config.labels, None)
        self.count = 0

    @torch.no_grad()
    def turn(
        self, wave: np.ndarray, sample_rate: int, speaker: str = "", id: str = "", labels: Mapping[str, float] | None = None
    ) -> Emotion:
        """``wave`` float32 [S] in [-1, 1] at any rate. BadRow when it has no samples or NaN; the dialogue then stands as before."""
        given = dict(labels or {})
        row = Row(id or f"turn-{self.count}", speaker=speaker, labels=given)
        samples = checked(np.asarray(wave, dtype=np.float32))
        heard = self.system.reader.hear(row, checked(audio.resample(samples, sample_rate, SAMPLE_RATE)))
        device = next(self.system.parameters()).device
        hidden = self.system.hear(collate([heard], together=True).to(device), torch.zeros(1, dtype=torch.long, device=device))
        if speaker not in self.speakers:
            self.speakers[speaker] = len(self.speakers)
            self.state = self.system.model.welcome(self.state)
        party = torch.tensor([self.speakers[speaker]], device=device)
        self.state, answer = self.system.model.step(self.state, hidden, party)
        self.count += 1
        return self.personal.answer(row.id, speaker, answer[0].cpu(), given)
