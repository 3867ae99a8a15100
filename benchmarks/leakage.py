"""Speed of searching text for quotes of protected text, and the matches found.

    python benchmarks/leakage.py --protected 'books/*.jsonl.gz' --text 'web/*.jsonl.gz'

Both options take globs like `files` of a recipe's source. Uses one core; reading is not timed.
"""

import argparse
import resource
import time

from colorfilter.config.recipe import Source
from colorfilter.data.documents import Document, read_file
from colorfilter.data.shards import list_files
from colorfilter.selection.decontamination import Protected, search


def documents(files: str) -> list[dict[str, str]]:
    """Read the name and text of all documents that match a glob."""
    source = Source.model_validate({"name": "files", "files": files})
    found = (d for file in list_files([source]) for d in read_file(file, source))
    return [
        {"name": f"{d.file}:{d.line}", "text": d.text} for d in found if isinstance(d, Document)
    ]


def megabytes(rows: list[dict[str, str]]) -> float:
    """Return the size of texts in UTF-8, in MB."""
    return sum(len(row["text"].encode()) for row in rows) / 1e6


def main() -> None:
    """Build the index, search the text, and print timings and the longest matches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--protected", required=True, help="glob of protected files")
    parser.add_argument("--text", required=True, help="glob of files to search")
    options = parser.parse_args()
    tests, rows = documents(options.protected), documents(options.text)

    begun = time.process_time()
    protected = Protected((row["name"], row["text"]) for row in tests)
    seconds = time.process_time() - begun
    print(
        f"protected: {len(protected)} documents, {megabytes(tests):.1f} MB, in {seconds:.2f} s; "
        f"{protected.too_short} too short"
    )
    begun = time.process_time()
    found = sorted(search(protected, rows), key=lambda pair: -pair[1].n_words)
    seconds = time.process_time() - begun
    size = megabytes(rows)
    print(
        f"searched: {len(rows):,} documents, {size:.1f} MB, in {seconds:.2f} s, "
        f"{10 * seconds / size:.2f} s per 10 MB"
    )
    print(
        f"{len(found)} matches in {len({row['name'] for row, _ in found})} documents, of "
        f"{len({match.protected for _, match in found})} protected ones"
    )
    for row, match in found[:5]:
        print(f"{match.n_words} words, {row['name']}, {match.protected}: {match.quote[:80]!r}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


if __name__ == "__main__":
    main()
