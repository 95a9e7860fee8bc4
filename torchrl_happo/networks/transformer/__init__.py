"""Transformers over the agents of a team: an encoder, a causal decoder, and how they act."""
