"""Neural memory: a small network per head whose weights are trained while the sequence is read."""
