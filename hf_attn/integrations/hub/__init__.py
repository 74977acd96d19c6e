"""hf_attn on the Hub: model cards, written and checked without a network."""
