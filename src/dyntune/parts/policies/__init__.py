"""Token policies, one file each: what gates derives from ``gating.py``, what reduces from ``reducing.py``."""

BASES = ("base", "course", "dispatcher", "gating", "reducing", "surrogate")
"""Modules that hold no policy."""
