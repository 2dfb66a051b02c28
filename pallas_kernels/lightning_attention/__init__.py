"""Lightning attention: causal linear attention with a constant decay per head."""

from pallas_kernels.lightning_attention.api import (
    IMPLEMENTATIONS,
    default_implementation,
    documents_for,
    end_state,
    gated_step,
    lightning_attention,
    serves_gated_step,
)
from pallas_kernels.lightning_attention.reference import recurrent_step

__all__ = [
    "IMPLEMENTATIONS",
    "default_implementation",
    "documents_for",
    "end_state",
    "gated_step",
    "lightning_attention",
    "recurrent_step",
    "serves_gated_step",
]
