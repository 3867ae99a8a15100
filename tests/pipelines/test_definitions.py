import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml

from colorfilter.config.load import load
from pipelines.graph import build_definitions
from pipelines.settings import RECIPES, recipe_path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_definitions_load_fast_and_without_torch(tmp_path: Path) -> None:
    """Code servers are started again and again: well under 3 s, heavy libraries later."""
    code = (
        "import sys; import pipelines.definitions; "
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    )
    environment = {"PATH": "", "COLORFILTER_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.yaml")))
def test_every_shipped_recipe_makes_a_valid_graph(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("COLORFILTER_BOOKS", "COLORFILTER_TASKS", "CORPUS", "DOMAIN"):
        monkeypatch.setenv(variable, str(tmp_path))
    recipe = load(recipe_path(name))
    dg.Definitions.validate_loadable(build_definitions(recipe, "/nowhere"))


def test_the_workspace_works_from_any_folder() -> None:
    (entry,) = yaml.safe_load((ROOT / "workspace.yaml").read_text())["load_from"]
    assert entry["python_file"] == {
        "relative_path": "pipelines/definitions.py",
        "working_directory": ".",
        "location_name": "colorfilter",
    }
    assert (ROOT / entry["python_file"]["relative_path"]).is_file()
