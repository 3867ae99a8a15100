"""Scoring of the corpus by every domain's models."""

from types import SimpleNamespace
from typing import Any

import pytest

from assets import scores
from colorfilter.errors import InputError
from colorfilter.recipe import Scoring


def test_two_domains_with_the_same_model_are_refused() -> None:
    """Its losses would belong to both."""
    fingerprints = {"prior_model": "a", "one/conditional_model": "b", "two/conditional_model": "b"}
    artifacts: Any = SimpleNamespace(
        current=lambda name, *_: SimpleNamespace(
            fingerprint=fingerprints.get(name, name), facts={"end_of_text": 0}
        )
    )
    context: Any = SimpleNamespace(partition_keys=[])
    by = {name.replace("model", "losses"): name for name in fingerprints}
    with pytest.raises(InputError, match="one/conditional_model and two/conditional_model are"):
        scores._score(context, artifacts, SimpleNamespace(), Scoring.model_validate({}), by)
