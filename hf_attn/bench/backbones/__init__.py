"""Vision backbones in the order of operations of their authors' code, for `hf_attn.bench.backbone_speed`.

A module here is one family: `PRESETS`, the names of the variants measured, and `Reference(config)`, a module with the
official parameter names that maps `[B, C, H, W]` to logits. The frame finds every module by itself.
"""
