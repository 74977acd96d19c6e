"""The mechanism "band" exists during every test of this folder."""

from __future__ import annotations

import pytest

import hf_attn
from tests.integrations.diffusers.band import BAND


@pytest.fixture(autouse=True)
def band():
    """The mechanism "band", registered for one test."""
    hf_attn.register_mechanism(BAND)
    yield BAND
    hf_attn.unregister_mechanism("band")
