import hashlib
import json
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colorfilter.storage.manifest import (
    MANIFEST,
    artifact_key,
    canonical_json,
    content,
    environment,
    parts,
    read_manifest,
    stands,
    write_manifest,
)

FACTS: dict[str, Any] = {
    "asset": "prior_scores",
    "partition": "web-1",
    "inputs": {"tokens": "abc", "model": "def"},
    "recipe": {"precision": "float32", "length": 16},
    "code": 1,
    "seed": 0,
    "precision": "float32",
}


def test_a_key_is_the_same_for_the_same_facts_in_any_order() -> None:
    turned = {
        **FACTS,
        "inputs": dict(reversed(FACTS["inputs"].items())),
        "recipe": dict(reversed(FACTS["recipe"].items())),
    }
    assert artifact_key(**turned) == artifact_key(**FACTS)
    assert len(artifact_key(**FACTS)) == 64


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("asset", "conditional_scores"),
        ("partition", "web-2"),
        ("partition", None),
        ("inputs", {"tokens": "abc", "model": "xyz"}),
        ("inputs", {"tokens": "def", "model": "abc"}),
        ("inputs", {"tokens": "abc"}),
        ("recipe", {"precision": "float32", "length": 32}),
        ("recipe", {}),
        ("code", 2),
        ("seed", 1),
        ("seed", None),
        ("precision", "bf16"),
    ],
)
def test_a_key_changes_with_every_fact(name: str, value: object) -> None:
    assert artifact_key(**{**FACTS, name: value}) != artifact_key(**FACTS)


def test_a_key_stays_what_it_was_in_earlier_versions() -> None:
    spelled = (
        '{"asset":"a","code":1,"inputs":{"x":"ü"},"partition":null,"precision":null,'
        '"recipe":{"k":[1,2.5]},"seed":null}'
    )
    expected = hashlib.sha256(spelled.encode()).hexdigest()
    assert artifact_key("a", None, {"x": "ü"}, {"k": [1, 2.5]}, 1) == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(json_values, st.randoms(use_true_random=False))
def test_canonical_json_is_one_form_for_one_value(value: Any, rng: random.Random) -> None:
    def shuffled(v: Any) -> Any:
        if isinstance(v, dict):
            items = [(k, shuffled(x)) for k, x in v.items()]
            rng.shuffle(items)
            return dict(items)
        return [shuffled(x) for x in v] if isinstance(v, list) else v

    assert canonical_json(shuffled(value)) == canonical_json(value)
    assert json.loads(canonical_json(value)) == value


# Manifests -----------------------------------------------------------------------------------


def a_folder(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_manifest_holds_every_file_with_size_and_hash(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, a="one", sub__b="größer")
    written = write_manifest(folder, {"rows": 3}, {"asset": "thing"})
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["fingerprint"] == written.fingerprint
    assert manifest["asset"] == "thing"
    assert written.manifest == hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    assert (written.bytes, written.rows) == (11, None)
    assert manifest["facts"] == {"rows": 3}
    assert manifest["files"] == [
        {"path": p, "bytes": len(t.encode()), "sha256": hashlib.sha256(t.encode()).hexdigest()}
        for p, t in (("a", "one"), ("sub/b", "größer"))
    ]


def fingerprint(folder: Path, facts: dict[str, str]) -> str:
    return write_manifest(folder, facts).fingerprint


def test_a_fingerprint_is_of_names_and_contents_alone(tmp_path: Path) -> None:
    first = fingerprint(a_folder(tmp_path / "1", a="one", b="two"), {"made": "today"})
    second = fingerprint(a_folder(tmp_path / "2", b="two", a="one"), {"made": "tomorrow"})
    assert first == second
    assert fingerprint(tmp_path / "1", {}) == first
    others = [
        fingerprint(a_folder(tmp_path / "3", a="one", c="two"), {}),
        fingerprint(a_folder(tmp_path / "4", a="one", b="TWO"), {}),
        fingerprint(a_folder(tmp_path / "5", a="two", b="one"), {}),
        fingerprint(a_folder(tmp_path / "6", a="one"), {}),
        fingerprint(a_folder(tmp_path / "7", a="one", b="two", c=""), {}),
    ]
    assert len({first, *others}) == 6


def test_of_parquet_files_the_rows_are_counted_and_of_a_part_what_it_holds(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, a="one", sub__b="four")
    pl.DataFrame({"x": [1, 2, 3]}).write_parquet(folder / "sub" / "x.parquet")
    pl.DataFrame({"x": [1, 2]}).write_parquet(folder / "x.parquet")
    written = write_manifest(folder, {})
    assert written.rows == 5
    part = content(folder, "sub")
    assert part.rows == 3
    assert part.bytes == 4 + (folder / "sub" / "x.parquet").stat().st_size
    assert part.fingerprint != written.fingerprint
    (folder / "a").write_text("two")
    write_manifest(folder, {})
    assert content(folder, "sub").fingerprint == part.fingerprint


def test_a_folder_stands_while_its_files_have_their_sizes(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "whole", a="one", sub__b="two")
    assert not stands(folder)
    write_manifest(folder, {})
    assert stands(folder)
    (folder / "extra").write_text("not in the manifest")
    assert stands(folder)


@pytest.mark.parametrize("damage", ["missing file", "shorter file", "longer file", "no folder"])
def test_a_damaged_folder_does_not_stand(tmp_path: Path, damage: str) -> None:
    folder = a_folder(tmp_path / "whole", a="one", sub__b="two")
    write_manifest(folder, {})
    path = folder / "sub" / "b"
    if damage == "missing file":
        path.unlink()
    elif damage == "shorter file":
        path.write_text("tw")
    elif damage == "longer file":
        path.write_text("twoo")
    else:
        folder = tmp_path / "nothing"
    assert not stands(folder)


def test_a_version_that_replaces_a_folder_has_its_fingerprint(tmp_path: Path) -> None:
    old = a_folder(tmp_path / "old", a="one", sub__b="two")
    made = write_manifest(old, {"fact": 1})
    new = a_folder(tmp_path / "new", a="one", sub__b="")
    origins = {"sub/b": hashlib.sha256(b"two").hexdigest()}
    now = write_manifest(new, {"fact": 1}, origins=origins)
    assert now.fingerprint == made.fingerprint
    assert parts(new) == parts(old) == {"sub": content(old, "sub").fingerprint}
    assert (now.bytes, now.manifest != made.manifest) == (3, True)
    files = {f["path"]: f for f in read_manifest(new)["files"]}
    assert files["sub/b"]["sha256"] == hashlib.sha256(b"").hexdigest()
    assert "origin" not in files["a"]
    assert stands(new)
    (new / "sub" / "b").write_text("two")  # it must not come back
    assert not stands(new)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"files": [{}]}', "\x00"])
def test_a_damaged_manifest_does_not_stand(tmp_path: Path, text: str) -> None:
    folder = a_folder(tmp_path, a="one")
    (folder / MANIFEST).write_text(text)
    assert not stands(folder)


def test_the_environment_names_versions_and_revision() -> None:
    facts = environment()
    assert {"python", "platform", "git", "torch", "polars", "duckdb"} <= facts.keys()
    assert all(isinstance(v, str) for v in facts.values())
