"""hf_attn in diffusers: `hf_attn.apply(pipe, name)`.

geometry: where the self-attention sites of each model class are and how its tokens lie. processors: what stands at a
site. attend: from a site's tensors to an AttentionCall. op: the same as one opaque op for compilers. backends: the
dispatcher of diffusers, context parallelism, backend names. state: one pipeline's mechanism, step and counters. hooks:
what a model tells before each forward. model: apply, remove, stats. doctor, potential: is it called, and what can it
gain at most?
"""

from hf_attn.integrations.diffusers.backends import register_backends, unregister_backends

__all__ = ["register_backends", "unregister_backends"]
