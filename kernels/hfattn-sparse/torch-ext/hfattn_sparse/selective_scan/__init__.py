"""Selective state-space scan (Mamba's recurrence) over groups of channels."""
