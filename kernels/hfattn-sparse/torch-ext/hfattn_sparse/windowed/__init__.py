"""Causal attention to the first tokens and a sliding window, exact to the token."""
