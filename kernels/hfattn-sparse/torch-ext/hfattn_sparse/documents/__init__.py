"""Attention of a prompt of documents: causal inside each, everybody sees the prefix, the reader sees all."""
