"""hf_attn in transformers: `attn_implementation="hf_attn_<mechanism>"`.

masks: from the host's masks to TokenLayout. attention: the one attention function. config: `config.hf_attn`.
registration: names. model: apply, remove, stats. doctor: is it really called? stats: counters.
"""
