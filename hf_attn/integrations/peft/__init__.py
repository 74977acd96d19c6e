"""hf_attn in PEFT: adapters say which converted base they belong to."""
