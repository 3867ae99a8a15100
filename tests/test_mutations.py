"""The faults of benchmarks/mutations.py match the code, and results are kept."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def mutations() -> ModuleType:
    found = importlib.util.spec_from_file_location("mutations", ROOT / "benchmarks/mutations.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_every_fault_fits_and_names_tests_that_are_there(mutations: ModuleType) -> None:
    assert len(mutations.FAULTS) >= 25
    assert len({fault.name for fault in mutations.FAULTS}) == len(mutations.FAULTS)
    assert {fault.path.split("/")[0] for fault in mutations.FAULTS} == {
        *("assets", "colorfilter", "commands", "pipelines", "resources"),
    }
    for fault in mutations.FAULTS:
        text = (ROOT / fault.path).read_text(encoding="utf-8")
        assert text.count(fault.old) == 1, fault.name
        assert fault.new != fault.old
        assert (ROOT / fault.tests).exists(), fault.name


def test_what_was_found_is_kept_and_not_looked_for_again(
    mutations: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, *rest = mutations.FAULTS[:3]
    results = tmp_path / "results.jsonl"
    known = mutations.Found(first.name, "tests/one.py::test", mutations.FAST, 1.0)
    results.write_text(json.dumps(known._asdict()) + "\n")
    tried = []

    def find(fault: object) -> object:
        tried.append(fault)
        return mutations.Found(fault.name, None, None, 1.0)

    monkeypatch.setattr(mutations, "FAULTS", [first, *rest])
    monkeypatch.setattr(mutations, "find", find)
    monkeypatch.setattr(mutations.sys, "argv", ["mutations.py", "--results", str(results)])
    assert mutations.main() == 1  # two were not found
    assert tried == rest
    assert len(results.read_text().splitlines()) == 3
