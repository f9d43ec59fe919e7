"""The gated delta rule and its gates; the state restarts at every document."""

from sparktune.kernels.gated_delta_rule.reference import (
    gated_delta_rule_last_state,
    gated_delta_rule_naive,
    gated_delta_rule_reference,
    gated_delta_rule_step,
    gdn_gates_reference,
)

__all__ = [
    "gated_delta_rule_last_state", "gated_delta_rule_naive", "gated_delta_rule_reference", "gated_delta_rule_step",
    "gdn_gates_reference",
]
