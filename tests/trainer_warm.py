"""Imported once by the server that the children of the trainer's tests are forked from: what is slow to load, and no threads."""

from __future__ import annotations

import torch.utils.tensorboard
import trainer_children  # noqa: F401

from lalia.nn import align
from lalia.pretrained import load_wavlm
from lalia.sections import ExternalModel
from lalia.text import analyse

analyse("Alpha bravo.", "en")
align.search_alignment(torch.zeros(1, 2, 2), torch.tensor([2]), torch.tensor([2]))
load_wavlm(ExternalModel("tiny"))
