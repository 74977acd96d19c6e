"""What reports say of the compiled CPU kernel."""

from __future__ import annotations

import os

from hf_attn.ops.hfattn_sparse import native


def cpu_kernel_state() -> str:
    """Whether the CPU kernel is built, how it multiplies bfloat16, and what keeps it off, in one line."""
    if not native.available():
        return "CPU kernel: not built; hf-attn build-cpu compiles it once, for faster sparse attention on this CPU"
    tiles = "AMX" if native.has_matrix_tiles() else "float32 arithmetic, no AMX"
    variable = os.environ.get("HF_ATTN_BACKEND", "").strip().lower()
    off = "" if variable in ("", "auto", "native") else f", kept off by HF_ATTN_BACKEND={variable}"
    return f"CPU kernel: built ({tiles}){off}"
