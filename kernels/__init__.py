"""Ops: one folder an op, each with a plain reference and, where it pays, a fused kernel behind the same function."""
