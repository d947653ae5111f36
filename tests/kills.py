"""How often the tests of data preparation and of training kill: ``KILLS=100 pytest -k killed_again`` for more."""

from __future__ import annotations

import os

KILLS = int(os.environ.get("KILLS", "20"))
"""Kills over both tests together."""
SEED = int(os.environ.get("KILL_SEED", "0"))
"""Of the moments at which they kill."""
DATA_PREP_KILLS = KILLS // 2
TRAINING_KILLS = KILLS - DATA_PREP_KILLS
