"""Attention of the heads that each token chose; see `op`."""
