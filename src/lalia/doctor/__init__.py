"""``lalia doctor``: what would go wrong, said before the run. Environment, data, configuration.

Each examination gives a report dataclass with ``problems`` (what ends a run), ``exit_status`` (1 where there are any),
``to_dict()`` for JSON, and :func:`show` prints any of them.
"""

from __future__ import annotations

from lalia.doctor.configuration import ConfigReport, doctor_config
from lalia.doctor.dataset import DataReport, doctor_data
from lalia.doctor.environment import EnvReport, doctor_env
from lalia.doctor.report import show

__all__ = ["ConfigReport", "DataReport", "EnvReport", "doctor_config", "doctor_data", "doctor_env", "show"]
