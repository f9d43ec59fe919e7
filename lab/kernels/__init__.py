"""Kernels that were tried and that nothing uses, with their numbers in docs/lab-log.md."""
