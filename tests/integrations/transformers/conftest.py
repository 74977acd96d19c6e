"""The mechanism "exact" exists during every test of this folder."""

from __future__ import annotations

import pytest

import hf_attn
from tests.integrations.transformers.tiny import EXACT


@pytest.fixture(autouse=True)
def exact():
    """The mechanism "exact", registered for one test."""
    hf_attn.register_mechanism(EXACT)
    yield EXACT
    hf_attn.unregister_mechanism("exact")
