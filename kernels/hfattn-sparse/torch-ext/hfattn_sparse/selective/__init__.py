"""Attention in which every KV head works on tokens of its own choice."""
