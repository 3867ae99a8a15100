"""The job `select` at any tau: its dry run, and that it scores nothing."""

from pathlib import Path
from typing import Any

import pytest

from colorfilter.errors import InputError
from pipelines.run import Failure
from resources.artifacts import ArtifactStore
from tests.assets.results import places, run_select, selection
from tests.conftest import Project, copy_of, made_since


def test_another_tau_is_selected_without_a_model_and_stands_for_the_recipe(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copy_of(finished, tmp_path)
    before, kernels = len(project.ledger()), len(project.kernel_runs())
    said = run_select(project, monkeypatch, tau=6, dry_run=True)
    assert isinstance(said, dict)
    assert len(project.ledger()) == before

    made = run_select(project, monkeypatch, tau=6)
    assert isinstance(made, dict)
    assert said == {k: v for k, v in made.items() if k != "dataset"}
    assert len(project.kernel_runs()) == kernels
    now, last = places(selection(project, "color_tau6")), places(selection(project, "color_tau4"))
    assert made["last"].startswith("color_tau4 of ")
    assert (made["entering"], made["leaving"]) == (len(now - last), len(last - now))
    assert made["leaving"] > 0
    assert made["overlap"] == len(now & last) / len(now)
    assert made["cutoff"] == selection(project, "color_tau6")["score"].max()
    dataset = ArtifactStore(home=str(project.home.root)).current(
        "reference/color_tau6/filtered_dataset"
    )
    assert Path(made["dataset"]) == dataset.path
    assert dataset.facts["sequences"] == len(now)

    # An arm of the recipe that asks for the same finds it.
    project.facts = {
        **project.facts,
        "arms": [*project.facts["arms"], {"method": "color", "tau": 6}],
    }
    project.facts["target"] = {**project.facts["target"], "training_tokens": 2_000}
    project.write()
    before = len(project.ledger())
    project.materialize(monkeypatch, ["reference/color_tau6/selection"])
    assert made_since(project, before) == {}


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"tau": 4, "domain": "nowhere"}, "domain: the recipe has no domain 'nowhere'"),
        ({"tau": 4, "method": "random"}, "method: 'random' does not select by scores alone"),
        ({"tau": 0.5}, "tau: Input should be greater than or equal to 1"),
        ({"tau": 4, "tokens": 10**9}, "target.training_tokens: needs"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_in_a_line(
    finished: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    choice: dict[str, Any],
    words: str,
) -> None:
    project = copy_of(finished, tmp_path)
    before = len(project.ledger())
    failure = run_select(project, monkeypatch, **choice)
    assert isinstance(failure, Failure)
    assert failure.input_is_wrong
    assert words in failure.message
    assert "\n" not in failure.message
    assert len(project.ledger()) == before
    assert InputError.__name__ not in failure.message
