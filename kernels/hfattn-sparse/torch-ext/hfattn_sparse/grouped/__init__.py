"""Attention by a grouped softmax: earlier blocks are entered through their landmark (arXiv 2305.16300)."""
