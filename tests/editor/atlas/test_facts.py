"""Edits that are made from Atlas's world."""

import pytest

from errata.editor.atlas.facts import KNOWN, counterfactual
from errata.editor.atlas.world import Attribute
from errata.editor.errors import InvalidInputError


def test_counterfactuals_change_each_fact_once_to_what_is_said_of_another_country() -> None:
    facts = counterfactual(120, seed=3)
    assert len({(f.country.name, f.attribute) for f in facts}) == 120
    for fact in facts:
        assert fact.target != fact.country.fact(fact.attribute)
        assert fact.target in {c.fact(fact.attribute) for c in KNOWN}
    assert counterfactual(120, seed=3) == facts != counterfactual(120, seed=4)


def test_no_more_facts_are_changed_than_there_are() -> None:
    every = len(KNOWN) * len(Attribute)
    assert len(counterfactual(every)) == every
    with pytest.raises(InvalidInputError, match=rf"knows {every} facts"):
        counterfactual(every + 1)
