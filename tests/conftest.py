"""One thread, no network, a clean backend choice: every test starts from the same place."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A compiled CPU kernel that this user has built must not decide what the tests run; `native_kernel` has one of its own.
os.environ["HF_ATTN_CACHE"] = str(Path(tempfile.gettempdir(), "hf-attn-tests-without-kernel"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers side by side would wait for each other's cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU Triton kernels run in its interpreter, which has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hf_attn.ops import reset_path_counts

_NOTHING_BUILT = os.environ["HF_ATTN_CACHE"]


def pytest_runtest_setup(item):
    """Tests that compile with inductor are skipped, and listed, where no C++ compiler runs."""
    if item.get_closest_marker("needs_cxx") and not torch.cuda.is_available():
        from hf_attn.bench.peers import cxx_missing

        if cxx_missing():
            pytest.skip("needs a C++ compiler: install g++, or set CXX")


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    """Seeded generator, no forced backend, path counters at zero."""
    monkeypatch.delenv("HF_ATTN_BACKEND", raising=False)
    torch.manual_seed(0)
    reset_path_counts()


@pytest.fixture(scope="session")
def native_folder(tmp_path_factory):
    """A cache with the compiled CPU kernel in it, built once for all workers of a run."""
    from hf_attn.bench.peers import cxx_missing
    from hf_attn.ops.hfattn_sparse import native

    if cxx_missing():
        pytest.skip("needs a C++ compiler: install g++, or set CXX")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "native"
    os.environ["HF_ATTN_CACHE"] = str(folder)
    try:
        native.build()
    finally:
        os.environ["HF_ATTN_CACHE"] = _NOTHING_BUILT
    return folder


@pytest.fixture
def native_kernel(native_folder, monkeypatch):
    """The compiled CPU kernel is there, and used where it pays."""
    monkeypatch.setenv("HF_ATTN_CACHE", str(native_folder))


@pytest.fixture
def sparse_path(monkeypatch):
    """The torch path forced, so that nothing switches to dense because it is short."""
    monkeypatch.setenv("HF_ATTN_BACKEND", "torch")


@pytest.fixture(scope="module")
def loopback(tmp_path_factory):
    """(a Hub on this machine, variables of processes that use it); see tests/loopback_hub.py."""
    from tests.loopback_hub import Hub, environment

    with Hub() as hub:
        yield hub, environment(hub, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A tiny random Llama with a byte-level tokenizer, saved as a user would have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)
