"""The trust-region step: conjugate gradient and line search."""
