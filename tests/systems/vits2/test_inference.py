"""What ``for_inference`` gives up and what it must not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import make_corpus
from vits2_models import build, parameters, stir

from lalia.system import SpeakRequest


@pytest.mark.parametrize("flow", ["wavenet", "transformer"])
def test_speech_stays_and_critics_go(tmp_path: Path, flow: str) -> None:
    make_corpus(tmp_path / "corpus")
    options: dict[str, Any] = {"model.flow": flow}
    system, corpus = build(tmp_path, **options)
    stir(system, 0.03)
    system.eval()
    request, row = SpeakRequest("Alpha bravo charlie delta.", speaker=corpus[0].speaker), corpus[0]
    spoken, again = system.speak([request])[0].wave, system.resynthesize([row])[0].wave
    pieces = np.concatenate(list(system.speak_stream(request, 8)))
    before = parameters(system)
    system.for_inference()
    np.testing.assert_allclose(system.speak([request])[0].wave, spoken, atol=1e-4)
    np.testing.assert_allclose(system.resynthesize([row])[0].wave, again, atol=1e-4)
    np.testing.assert_allclose(np.concatenate(list(system.speak_stream(request, 8))), pieces, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.isfinite(system.speak([request])[0].wave).all()
    assert parameters(system) < before
    system.for_inference()  # twice is harmless
    np.testing.assert_allclose(system.speak([request])[0].wave, spoken, atol=1e-4)
