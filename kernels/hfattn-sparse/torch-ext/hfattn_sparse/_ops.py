"""Namespace of the custom ops in development; the build script of a published kernel rewrites this file."""


def add_op_namespace_prefix(op_name: str) -> str:
    """Full name of a custom op."""
    return f"hf_attn::{op_name}"
