"""Attention in which every query token chooses its own key blocks."""
