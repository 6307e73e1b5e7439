"""Does it listen? A trained ``omni-chat`` run on AudioBench-mini: accuracy with the real recordings and three kinds of wrong ones.

``LALIA_OMNI_CHAT`` names the run folder (``runs/omni-chat``), ``LALIA_AUDIOBENCH`` the questions
(``data/instructions/audiobench-mini.jsonl``). Training a model for this takes longer than a benchmark may, so that without a run
there is nothing to measure, and this says so.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lalia import checkpoint
from lalia.data import Corpus
from lalia.evaluate.audiobench import BenchEvaluation, evaluate_audiobench, verdict

ROOT = Path(__file__).resolve().parents[1]
RUN = Path(os.environ.get("LALIA_OMNI_CHAT", ROOT / "runs" / "omni-chat"))
QUESTIONS = Path(os.environ.get("LALIA_AUDIOBENCH", ROOT / "data" / "instructions" / "audiobench-mini.jsonl"))
ADVICE = "train configs/omni/chat.yaml, or set LALIA_OMNI_CHAT and LALIA_AUDIOBENCH"


def run() -> dict[str, dict[str, Any]]:
    """The row ``audiobench_mini``; nothing, and a line that says why, when there is no run or no questions."""
    missing = [str(path) for path in (RUN, QUESTIONS) if not path.exists()]
    if missing:
        print(f"audiobench_mini is left out, there is no {' and no '.join(missing)}: {ADVICE}")
        return {}
    system: Any = checkpoint.load(RUN)
    system.for_inference()
    return {"audiobench_mini": row(evaluate_audiobench(system, Corpus.read([QUESTIONS]), name=system.config.system))}


def row(found: BenchEvaluation) -> dict[str, Any]:
    """Accuracy (``mean``), low and high by style and condition, and what they say."""
    variants = {
        f"{style}/{condition}": {"mean": round(a.value, 4), "low": round(a.low, 4), "high": round(a.high, 4)}
        for style, scores in found.scores.items()
        for condition, a in scores.items()
    }
    said = "; ".join(f"{style}: {verdict(found, style)}" for style in found.scores)
    return {"variants": variants, "questions": found.questions, "note": f"{said}. Chance is 25 %, Wilson's 95 % intervals"}
