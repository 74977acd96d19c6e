"""Block-sparse attention with low-bit matrix products."""
