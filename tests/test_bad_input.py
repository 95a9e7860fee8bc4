"""Bad input: every wrong call gets one clear sentence, and leaves everything as it was.

The table is in ``wrong_library.py``, ``wrong_transformer.py`` and ``wrong_recipe.py``; what its
rows are made of is in ``wrong_calls.py``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mended_data import DATA, WITHOUT_CURE
from mended_library import CALLS
from wrong_calls import same
from wrong_library import BATCHES, LOSSES, STATES, TEAMS, UPDATERS
from wrong_recipe import BUILDERS, CHECKPOINTS, COMMANDS, CONFIGS
from wrong_transformer import TRANSFORMER_CALLS, TRANSFORMERS

import torchrl_happo
from torchrl_happo.recipe.compose import compose_config

PACKAGE = Path(torchrl_happo.__file__).parent
MENDED = {**CALLS, **DATA, **TRANSFORMER_CALLS}
TABLE = [
    *LOSSES, *UPDATERS, *BATCHES, *TEAMS, *STATES, *BUILDERS, *TRANSFORMERS, *CONFIGS, *CHECKPOINTS
]  # fmt: skip


@pytest.mark.parametrize("wrong", TABLE, ids=str)
def test_wrong_call(wrong):
    """The error says in one sentence, our own, what is wrong; nothing has changed, bit for bit."""
    given = wrong.given()
    before = None if given is None else given.state()
    with pytest.raises(wrong.error) as caught:
        wrong.call(given)
    if given is not None:
        assert same(given.state(), before)
    sentence = str(caught.value.args[0])
    assert re.search(wrong.words, sentence), sentence
    assert "\n" not in sentence
    assert len(sentence) < 300
    if "unexpected keyword argument" not in sentence:  # Python's own words for it are good
        assert caught.traceback[-1].path.is_relative_to(PACKAGE), caught.getrepr()
        assert sentence.endswith((".", "?"))


@pytest.mark.parametrize("name", MENDED)
def test_mended_call(name):
    """The cure that the sentence of a wrong call names works."""
    MENDED[name]()


def test_every_cure_is_tried():
    """A wrong call has a mended one beside it, or its sentence names no cure."""
    tables = (*LOSSES, *UPDATERS, *BATCHES, *TEAMS, *STATES, *BUILDERS, *TRANSFORMERS)
    wrong = {wrong.name for wrong in tables}
    assert MENDED.keys() | WITHOUT_CURE == wrong | (MENDED.keys() & {w.name for w in CHECKPOINTS})
    assert not MENDED.keys() & WITHOUT_CURE


@pytest.mark.parametrize(("wrong", "mended"), [row[:2] for row in COMMANDS], ids=str)
def test_mended_command(wrong, mended):
    """The command line that a sentence asks for composes."""
    assert wrong != mended
    compose_config(*mended.split())


def test_the_table_is_long_and_names_each_row_once():
    """At least sixty wrong calls, each under a name of its own."""
    names = [wrong.name for wrong in TABLE]
    assert len(names) == len(set(names)) >= 60
