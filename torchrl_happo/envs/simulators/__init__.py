"""Simulators as batched TorchRL environments."""
