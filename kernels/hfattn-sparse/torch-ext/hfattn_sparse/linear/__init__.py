"""Causal linear attention with an exponential decay: blocks of masked products around a running state."""
