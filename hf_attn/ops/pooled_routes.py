"""select_pooled_routes: which key blocks every query reads, chosen from pools of (block, query) scores."""

from __future__ import annotations

from torch import Tensor

from hf_attn.checks import require_int, require_one_of
from hf_attn.ops.backend import check_qkv, choose_path

SCOPES = ("query_head", "head_global", "block", "overall")
RULES = ("top_k", "threshold")


def select_pooled_routes(
    query: Tensor,
    key: Tensor,
    own: Tensor,
    *,
    block_size: int,
    scope: str = "query_head",
    top_k: int | float | None = None,
    tau: float | None = None,
) -> Tensor:
    """Key blocks of every query by mean key . query, chosen over pools of pairs (VMoBA, arXiv 2506.23858, section 3).

    Not causal, rows without padding. A query's own block is always chosen and counts.

    Args:
        query: `[B, Hq, Nq, D]`; key: `[B, Hkv, Nk, D]` in an order in which blocks are runs of `block_size` keys (the
            last may be shorter).
        own: int `[Nq]`, the block in which each query lies.
        scope: what competes, always within one sample. "query_head": the blocks of one query and head. "head_global":
            all pairs of a head. "block": all pairs of a block (not with `top_k`). "overall": all pairs.
        top_k: blocks a query reads on average, >= 1; in "query_head" every query reads that many, or, with a
            fraction, evenly spread queries one more.
        tau: in (0, 1]: the fewest best pairs that hold, with the own ones, this share of the pool's similarity (scores
            stretched to 0 .. 1), at least one; 1 takes all. Exactly one of `top_k` and `tau`.

    Returns:
        bool `[B, Hq, Nq, ceil(Nk / block_size)]` for `routed_block_attention`. On equal scores the pair that comes
        first (head, then block, then query) wins. Not differentiable.

    Raises:
        ValueError: what does not fit, naming the argument.
    """
    check_qkv(query, key, key)
    path = choose_path("select_pooled_routes", query, query.shape[3])
    require_int("block_size", block_size, 1)
    rule, amount = check_pool_rule(scope, top_k, tau)
    if own.dim() != 1 or own.numel() != query.shape[2] or own.is_floating_point():
        raise ValueError(f"own must be integers [{query.shape[2]}], got {own.dtype} {tuple(own.shape)}")

    from hf_attn.ops.hfattn_sparse.pooled_routes import op

    run = op.select_pooled_routes_reference if path == "reference" else op.select_pooled_routes
    return run(query.detach(), key.detach(), own, block_size, rule, scope, amount).mT


def block_scores(query: Tensor, key: Tensor, *, block_size: int) -> Tensor:
    """What `select_pooled_routes` ranks: mean key of every block . query, not scaled, `[B, Hq, n, Nq]` in fp32."""
    check_qkv(query, key, key)
    require_int("block_size", block_size, 1)

    from hf_attn.ops.hfattn_sparse.pooled_routes import reference, torch_path

    path = choose_path("block_scores", query, query.shape[3])
    return (reference if path == "reference" else torch_path).block_scores(query, key, block_size)


def check_pool_rule(scope: str, top_k: int | float | None, tau: float | None) -> tuple[str, float]:
    """Name and amount of the one rule that is given; raises ValueError for what does not fit the scope."""
    require_one_of("scope", scope, SCOPES)
    if (top_k is None) == (tau is None):
        raise ValueError(f"give exactly one of top_k and tau, got top_k={top_k!r} and tau={tau!r}")
    if tau is not None:
        if isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 < tau <= 1:
            raise ValueError(f"tau must be a number in (0, 1], got {tau!r}")
        return "threshold", float(tau)
    if isinstance(top_k, bool) or not isinstance(top_k, int | float) or not top_k >= 1:
        raise ValueError(f"top_k must be a number of blocks >= 1, got {top_k!r}")
    if scope == "block":
        raise ValueError("scope='block' has no top_k: every query would compete for the same block; use tau")
    return "top_k", float(top_k)
