"""One agent's policy as a function of tensors."""
