"""Examples that one reads and runs."""
