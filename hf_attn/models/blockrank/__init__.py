"""BlockRank rankers: prompts of documents, and the class that ranks with them."""

from hf_attn.models.blockrank.prompt import PromptBatch, PromptBuilder, RankingPrompt, batch_prompts
from hf_attn.models.blockrank.ranker import BlockRanker

__all__ = ["BlockRanker", "PromptBatch", "PromptBuilder", "RankingPrompt", "batch_prompts"]
