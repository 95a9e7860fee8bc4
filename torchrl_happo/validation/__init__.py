"""Wrong calls, each refused in one sentence that leaves everything as it was."""
