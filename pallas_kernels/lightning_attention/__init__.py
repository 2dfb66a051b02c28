"""Lightning attention: causal linear attention with a constant decay per head."""

from pallas_kernels.lightning_attention.api import (
    IMPLEMENTATIONS,
    default_implementation,
    documents_for,
    end_state,
    lightning_attention,
)
from pallas_kernels.lightning_attention.reference import recurrent_step
from pallas_kernels.lightning_attention.segments import document_runs

__all__ = [
    "IMPLEMENTATIONS",
    "default_implementation",
    "document_runs",
    "documents_for",
    "end_state",
    "lightning_attention",
    "recurrent_step",
]
