"""HAPPO and HATRPO for TorchRL: train a team of different agents, one after the other."""

from __future__ import annotations

__version__ = "0.1.0"
