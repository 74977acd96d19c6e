"""Every cell of docs/compatibility.md, and the page itself."""

from __future__ import annotations

import re

import pytest
import transformers

from tests.compatibility.families import FAMILIES
from tests.compatibility.modes import MODES
from tests.compatibility.table import KINDS, MECHANISMS, PAGE, render, run_cell


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_cell(mechanism, family, mode):
    """Equal to transformers' own attention and counted, refused by name, or no mode of the model at all."""
    outcome = run_cell(family, mechanism, mode)
    assert outcome.kind in KINDS
    assert outcome.why or outcome.kind == "right"


def test_the_table_is_as_large_as_promised():
    assert len(FAMILIES) >= 16 and len(MODES) >= 14
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_the_page_says_what_the_cells_gave():
    made_with = re.search(r"Made with transformers (\S+)\.\n", PAGE.read_text()).group(1)
    if made_with != transformers.__version__:
        pytest.skip(f"the page is about transformers {made_with}, installed is {transformers.__version__}")
    again = "run: python -m tests.compatibility.write_table"
    assert PAGE.read_text() == render(), again
