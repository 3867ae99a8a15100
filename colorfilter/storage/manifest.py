"""Identity of what is made: the key (known before the work), the fingerprint (of the content).

The environment is recorded beside the two and is in neither, so that neither a refactoring nor an
upgrade makes anything be computed again by itself.
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
    """What identifies a piece of work before it is done.

    `inputs` are fingerprints by name, `recipe` the part of it that the work reads, `code` a number
    raised by hand when the result of the code changes.
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
    """JSON of one form for one value: keys sorted, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class Content(NamedTuple):
    """What a folder holds: its fingerprint, the sha256 of its manifest, and how much it is.

    `rows` are those of its Parquet files, None where it has none.
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
    """Hash every file of a folder into its `manifest.json`, written last.

    The fingerprint is a hash of the names and contents of the files alone. `identity` says what the
    folder is and what it was made from. `origins` are, by path, the sha256 of files that these
    replace: they take the place of the files' own in the fingerprint, which so stays.
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
    """What the manifest of a folder says."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def content(folder: Path, part: str = "") -> Content:
    """What a folder that stands holds, by its manifest, or what a subfolder of it does."""
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
    """The fingerprints of a folder's subfolders, by name."""
    files = [Path(f["path"]) for f in read_manifest(folder)["files"]]
    names = sorted({path.parts[0] for path in files if len(path.parts) > 1})
    return {name: content(folder, name).fingerprint for name in names}


def fingerprint_of(files: Sequence[Mapping[str, Any]]) -> str:
    """The hash of the names and original contents of files, as a manifest lists them."""
    content = canonical_json([[f["path"], f.get("origin", f["sha256"])] for f in files])
    return hashlib.sha256(content.encode()).hexdigest()


def stands(folder: Path) -> bool:
    """Whether a folder is whole, by the cheap check: its manifest, and every file's size."""
    try:
        files = {folder / f["path"]: f["bytes"] for f in read_manifest(folder)["files"]}
        return all(path.stat().st_size == size for path, size in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


@functools.cache
def environment() -> dict[str, str]:
    """Versions of what computes here: libraries, Python, machine, git revision of this code."""
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
    # Code that is installed by another user than the one who runs it is not suspicious here.
    trusted = f"safe.directory={root}"
    command = ["git", "-c", trusted, "-C", str(root), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
