"""Exact games with known answers."""
