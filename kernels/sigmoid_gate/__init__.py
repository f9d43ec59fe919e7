"""The attention's output gate: x * sigmoid(gate)."""

from sparktune.kernels.sigmoid_gate.reference import sigmoid_gate_reference

__all__ = ["sigmoid_gate_reference"]
