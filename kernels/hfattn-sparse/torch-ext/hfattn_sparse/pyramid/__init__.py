"""Attention over a pyramid of pooled keys: every (query block, key block) pair has its own resolution."""
