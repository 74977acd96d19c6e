"""Attention over selected (query block, key block) pairs."""
