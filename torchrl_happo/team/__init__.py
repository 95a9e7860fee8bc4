"""Who the agents are and where their data lies."""
