"""Neighborhood attention on token grids of one, two or three axes."""
