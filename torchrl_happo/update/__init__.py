"""The sequential update."""
