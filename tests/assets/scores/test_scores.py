"""Scoring of the corpus by every domain's models."""

from types import SimpleNamespace
from typing import Any

import pytest

from assets.scores import scores
from colorfilter.errors import InputError


def test_two_domains_with_the_same_model_are_refused() -> None:
    """Its losses would belong to both."""
    fingerprints = {"prior_model": "a", "one/conditional_model": "b", "two/conditional_model": "b"}
    models: Any = {n: SimpleNamespace(fingerprint=f) for n, f in fingerprints.items()}
    with pytest.raises(InputError, match="one/conditional_model and two/conditional_model are"):
        scores.refuse_same_models(models)
    del models["two/conditional_model"]
    scores.refuse_same_models(models)
