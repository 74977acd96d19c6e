"""Paged decoding: key statistics, page scores and selection, quantised pages, attention over lists of pages."""

from .pages import Pages
from .quantization import dequantize, pack_int4, quantize_per_tensor, quantize_per_token, unpack_int4
from .selection import page_scores, select_pages
from .statistics import page_statistics
from .torch_path import paged_attention

__all__ = [
    "Pages",
    "dequantize",
    "pack_int4",
    "page_scores",
    "page_statistics",
    "paged_attention",
    "quantize_per_tensor",
    "quantize_per_token",
    "select_pages",
    "unpack_int4",
]
