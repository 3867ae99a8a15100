"""Identity of artifacts: the key, known before the work, and the fingerprint of the content.

The environment is recorded in the manifest but is part of neither, so that refactoring or an
upgrade alone recomputes nothing.
"""

import functools
import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from colorfilter.storage.files import file_sha256, write_text_atomically

MANIFEST = "manifest.json"
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "polars",
    "duckdb",
    "pyarrow",
    "dagster",
    "lm_eval",
)


def artifact_key(
    asset: str,
    partition: str | None,
    inputs: Mapping[str, str],
    recipe: Mapping[str, Any],
    code: int,
    seed: int | None = None,
    precision: str | None = None,
) -> str:
    """Return the hash that identifies a piece of work before it is done.

    `inputs` maps names to fingerprints, `recipe` is the part of the recipe that the work reads, and
    `code` is a number raised by hand when the result of the code changes.
    """
    facts = {
        "asset": asset,
        "partition": partition,
        "inputs": dict(inputs),
        "recipe": dict(recipe),
        "code": code,
        "seed": seed,
        "precision": precision,
    }
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """Return canonical JSON: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class Content(NamedTuple):
    """The content of a folder: its fingerprint, the sha256 of its manifest, and its size.

    `rows` is the number of rows in its Parquet files, None if it has none.
    """

    fingerprint: str
    manifest: str
    bytes: int
    rows: int | None


def write_manifest(
    folder: Path,
    facts: Mapping[str, Any],
    identity: Mapping[str, Any] | None = None,
    origins: Mapping[str, str] | None = None,
) -> Content:
    """Hash every file of a folder into its `manifest.json`, which is written last.

    The fingerprint is a hash of the names and contents of the files only. `identity` describes the
    folder and what it was computed from. `origins` maps paths of redacted files to the sha256 of
    the originals, which is used in the fingerprint, so that the fingerprint stays the same.
    """
    files = [
        _file(p, str(p.relative_to(folder)))
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    ]
    for file in files:
        if origins and file["path"] in origins:
            file["origin"] = origins[file["path"]]
    manifest = {
        "fingerprint": fingerprint_of(files),
        **(identity or {}),
        "facts": dict(facts),
        "files": files,
    }
    write_text_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
    return content(folder)


def _file(path: Path, name: str) -> dict[str, Any]:
    facts = {"path": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    if path.suffix == ".parquet":
        facts["rows"] = pq.read_metadata(path).num_rows
    return facts


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def content(folder: Path, part: str = "") -> Content:
    """Return the content of a folder, or of its subfolder `part`, according to its manifest."""
    below = f"{part}/" if part else ""
    files = [f for f in read_manifest(folder)["files"] if f["path"].startswith(below)]
    rows = [f["rows"] for f in files if "rows" in f]
    return Content(
        fingerprint_of(files),
        file_sha256(folder / MANIFEST),
        sum(f["bytes"] for f in files),
        sum(rows) if rows else None,
    )


def parts(folder: Path) -> dict[str, str]:
    """Return the fingerprints of a folder's subfolders, by name."""
    files = [Path(f["path"]) for f in read_manifest(folder)["files"]]
    names = sorted({path.parts[0] for path in files if len(path.parts) > 1})
    return {name: content(folder, name).fingerprint for name in names}


def fingerprint_of(files: Sequence[Mapping[str, Any]]) -> str:
    """Return the hash of the names and original contents of files listed in a manifest."""
    content = canonical_json([[f["path"], f.get("origin", f["sha256"])] for f in files])
    return hashlib.sha256(content.encode()).hexdigest()


def stands(folder: Path) -> bool:
    """Return whether a folder is complete, by a cheap check: its manifest and the file sizes."""
    try:
        files = {folder / f["path"]: f["bytes"] for f in read_manifest(folder)["files"]}
        return all(path.stat().st_size == size for path, size in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


@functools.cache
def environment() -> dict[str, str]:
    """Return the versions of Python, libraries, platform, and this code (git revision)."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": _git_revision(),
        **versions,
    }


def _git_revision() -> str:
    root = Path(__file__).resolve().parents[2]
    # Git refuses repositories owned by another user; here, such an installation is normal.
    trusted = f"safe.directory={root}"
    command = ["git", "-c", trusted, "-C", str(root), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
