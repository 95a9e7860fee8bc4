"""Networks from an environment's specs."""
