"""Judging a trained system: figures with bootstrap intervals, recognisers, the harness and the report.

``metrics`` and ``bootstrap`` compute, ``pitch`` and ``warp`` measure waves, ``recognise`` writes down what was said,
``harness`` runs them over a test corpus, ``report`` makes one self-contained page of it.
"""

from lalia.evaluate.harness import evaluate
from lalia.evaluate.recognise import Recogniser, open_recogniser
from lalia.evaluate.report import write_report
from lalia.evaluate.results import Evaluation, Figure

__all__ = ["Evaluation", "Figure", "Recogniser", "evaluate", "open_recogniser", "write_report"]
