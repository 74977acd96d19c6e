"""16k tokens, batch 2: nothing holds a dense [Nq, Nk] mask, neither the mask function nor a forward."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils as host

import hf_attn
from hf_attn.integrations.transformers.masks import COMPACT_OK
from tests.compatibility.families import ALTERNATING, GPT2, GROUPED, MLA, SEQ2SEQ, TEXT, encoder_tokens, text

LENGTH, BATCH = 16384, 2
MASK_BYTES = BATCH * LENGTH * LENGTH  # of a dense bool mask
CAP = MASK_BYTES // 4


class NothingLarge(TorchDispatchMode):
    """Fails on any tensor with `CAP` bytes of storage or more; views of small tensors are small."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes()
                assert size < CAP, f"{func} made {tuple(tensor.shape)} {tensor.dtype}, {size >> 20} MiB"
        return out


def address_space() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[0]) * resource.getpagesize()


@contextlib.contextmanager
def memory_cap(extra: int):
    """Not more than `extra` bytes beyond what the process has: also what opaque ops allocate counts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def left_padding(length: int = LENGTH) -> torch.Tensor:
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[0, :100] = 0
    return mask


def config_of(model_type: str, **options):
    config = transformers.AutoConfig.for_model(model_type, **options)
    config = config.get_text_config() if model_type not in ("whisper", "bart") else config
    config._attn_implementation = "hf_attn_moba"
    return config


RESTARTING = torch.arange(LENGTH // 2).repeat(2).expand(BATCH, -1)
# Builder of the host, 2-D mask, further arguments.
MASKS = {
    "plain": ("create_causal_mask", None, {}),
    "padded": ("create_causal_mask", left_padding(), {}),
    "packed": ("create_causal_mask", None, {"position_ids": RESTARTING}),
    "window": ("create_sliding_window_causal_mask", left_padding(), {}),
    "packed window": ("create_sliding_window_causal_mask", None, {"position_ids": RESTARTING}),
    "both ways": ("create_bidirectional_mask", left_padding(), {}),
    "window both ways": ("create_bidirectional_sliding_window_mask", left_padding(), {}),
}


@pytest.mark.parametrize("scenario", list(MASKS))
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "deepseek_v3", "bert", "modernbert", "whisper"])
def test_masks_are_never_dense(model_type, scenario):
    assert model_type in COMPACT_OK
    builder, padding, arguments = MASKS[scenario]
    config = config_of(model_type)
    if getattr(config, "sliding_window", None) is None:
        config.sliding_window = 64
    with NothingLarge():
        # No cache, no encoder: whatever this version calls the fourth argument.
        mask = getattr(host, builder)(config, torch.zeros(BATCH, LENGTH, 1), padding, None, **arguments)
    assert (mask is None) == (scenario == "plain")
    assert mask is None or mask.numel() <= BATCH * 4 * 2 * LENGTH


def test_the_host_would_make_a_dense_one():
    """The cap means something: SDPA's own mask for the same arguments breaks it, both ways of measuring."""
    config = config_of("llama")
    config._attn_implementation = "sdpa"
    embeds = torch.zeros(BATCH, LENGTH, 1)
    with pytest.raises(AssertionError, match="MiB"), NothingLarge():
        host.create_causal_mask(config, embeds, left_padding(), None)
    with pytest.raises(RuntimeError, match="allocate"), memory_cap(CAP):
        torch.empty(MASK_BYTES, dtype=torch.bool)


# Two heads of eight, one layer (two where kinds alternate).
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "vocab_size": 9, "max_position_embeddings": LENGTH + 2}  # fmt: skip
TINY = {**GROUPED, **SMALL, "num_key_value_heads": 1}
TWO = {"num_hidden_layers": 2}
SEQ = {**SEQ2SEQ, "vocab_size": 9, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
       "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
       "max_position_embeddings": LENGTH + 2, "forced_eos_token_id": None}  # fmt: skip
CAUSAL = {
    "Llama": text("Llama", **TINY),
    "Gemma 3 text": text("Gemma3Text", **{**TINY, **TWO}, **ALTERNATING, query_pre_attn_scalar=8),
    "DeepSeek-V3": text("DeepseekV3", **{**TEXT, **SMALL}, num_key_value_heads=2, **MLA),
    "GPT-2": text("GPT2", "LMHeadModel", **{**GPT2, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LENGTH,
                                            "vocab_size": 9}),
}  # fmt: skip
ENCODERS = {
    "BERT": text("Bert", "ForMaskedLM", **{**TEXT, **SMALL}),
    "ModernBERT": text("ModernBert", "ForMaskedLM", **{**TEXT, **SMALL, **TWO}, cls_token_id=1, sep_token_id=2,
                       layer_types=["full_attention", "sliding_attention"]),
    "BART": text("Bart", "ForConditionalGeneration", **SEQ),
}  # fmt: skip
OPTIONS = {
    "moba": {"block_size": 256, "top_k": 3, "min_seq_len": 0},
    "streaming": {"block_size": 256, "window": 512, "num_sinks": 4},
}
CASES = [(mechanism, name) for name in CAUSAL for mechanism in OPTIONS] + [("moba", name) for name in ENCODERS]


@pytest.mark.parametrize("mechanism, name", CASES, ids=lambda value: value.replace(" ", "_"))
@torch.no_grad()
def test_a_forward_stays_under_the_cap(mechanism, name, sparse_path):
    """Left-padded rows; one dense mask alone would break the cap."""
    cls, config = (CAUSAL | ENCODERS)[name]()
    model = cls._from_config(config, attn_implementation=hf_attn.spec(mechanism, **OPTIONS[mechanism])).eval()
    ids = torch.randint(3, 9, (BATCH, LENGTH))
    given = {"input_ids": ids, "attention_mask": left_padding()}
    if name == "BART":
        given = {**encoder_tokens(ids), "input_ids": ids, "attention_mask": left_padding()}
        given["decoder_attention_mask"] = left_padding()
    given |= {} if name in ("BERT", "ModernBERT") else {"use_cache": False}
    model(**{k: v[:, :200] if k != "use_cache" else v for k, v in given.items()})
    hf_attn.reset_stats(model)
    with memory_cap(MASK_BYTES // 2), NothingLarge():
        model(**given)
    assert hf_attn.stats(model)["totals"]["sparse_calls"] > 0
