"""Options: bad ones raise with a message that finishes the job, good ones survive a JSON round trip."""

from __future__ import annotations

import json
import re

import pytest

from hf_attn.mechanism import get_mechanism
from tests.cases import CASES

BAD = [(case, name) for case in CASES for name in case.bad_options]


@pytest.mark.parametrize(("case", "name"), BAD, ids=[f"{case.id}-{name}" for case, name in BAD])
def test_bad_option(case, name):
    options, message = case.bad_options[name]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        get_mechanism(case.mechanism).config.from_dict(options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_round_trip(case):
    config_class = get_mechanism(case.mechanism).config
    config = config_class.from_dict({**case.options, "layers": {0: None, "-2:": {case.size_option: 8}}})
    stored = json.loads(json.dumps(config.to_dict()))
    assert config_class.from_dict(stored) == config
    assert json.dumps(config_class.from_dict(stored).to_dict()) == json.dumps(config.to_dict())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_layers(case):
    config_class = get_mechanism(case.mechanism).config
    config = config_class.from_dict({**case.options, "layers": {"::2": {case.size_option: 4}, -1: None, "0": None}})
    assert config.for_layer(0, 5) is None and config.for_layer(4, 5) is None
    own = case.options[case.size_option]
    assert getattr(config.for_layer(2, 5), case.size_option) == 4
    assert getattr(config.for_layer(1, 5), case.size_option) == own
    assert getattr(config_class.from_dict(case.options).for_layer(None, None), case.size_option) == own
    with pytest.raises(ValueError, match="no layer_idx"):
        config.for_layer(None, 5)
    with pytest.raises(ValueError, match="names layer 7, but the model has 5 layers"):
        config_class.from_dict({**case.options, "layers": {7: None}}).check_layer_count(5)


def test_unknown_mechanism():
    with pytest.raises(ValueError, match=re.escape("unknown mechanism 'mobba' (did you mean 'moba'?)")):
        get_mechanism("mobba")
