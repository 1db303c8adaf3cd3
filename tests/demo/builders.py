"""The shortest schedule that trains anything."""

from __future__ import annotations

from resta.demo.models import Schedule, Stage

BRIEF = Schedule(
    base=Stage(steps=3, learning_rate=3e-3, batch=4),
    aligned=Stage(steps=2, learning_rate=1e-3, batch=4),
    tuned=Stage(steps=2, learning_rate=1e-3, batch=4),
    hidden=16,
    layers=1,
)
