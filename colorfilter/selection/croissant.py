"""Describe a filtered dataset for machines: `croissant.json`, in MLCommons Croissant 1.1.

It lists every file with its size and sha256, and every field of the texts with its type and
meaning, in JSON-LD (https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html). It has no
date, path or fingerprint, so that equal content is described by equal bytes.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from colorfilter.selection.dataset import FILTERED, LICENCE
from colorfilter.storage.files import file_sha256

NAME = "croissant.json"
# The complete `@context` of the specification: readers compare it.
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
CITATION = (
    "@inproceedings{brandfonbrener2024color, title={CoLoR-Filter: Conditional Loss Reduction "
    "Filtering for Targeted Language Model Pre-training}, author={Brandfonbrener, David and "
    "Zhang, Hanlin and Kirsch, Andreas and Schwarz, Jonathan Richard and Kakade, Sham}, "
    "booktitle={NeurIPS}, year={2024}, url={https://arxiv.org/abs/2406.10670}}"
)
TYPES = {pa.string(): "sc:Text", pa.int64(): "cr:Int64", pa.float64(): "cr:Float64"}
MEANINGS = {
    "text": "A contiguous run of selected text from one document, in its original characters; or "
    "the complete document, if complete documents were requested.",
    "doc_id": "Id of the document that contains the text.",
    "source": "Name, in the recipe, of the source that contains the document.",
    "color": "Conditional minus prior loss in nats per token, averaged over the text's tokens; "
    "lower is better. Null if the text was not scored.",
    "fraction": "Share of the document's tokens that were selected.",
    "n_tokens": "Number of tokens in the text.",
    "shard": "Shard of the corpus that contains the document.",
    "char_start": "Start of the text in the document, in characters.",
    "char_end": "End of the text in the document, in characters (exclusive).",
    "extra": "Other fields of the document in its source, such as url or licence, as JSON.",
}
ENCODINGS = {".parquet": "application/x-parquet", ".npy": "application/octet-stream"}


def write_croissant(folder: Path, title: str, sentence: str) -> None:
    """Write `croissant.json`, which describes `documents/` and `tokens/` of a filtered dataset."""
    files = sorted(folder.glob("documents/*.parquet")) + sorted(folder.glob("tokens/*"))
    description = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": title,
        "description": sentence,
        "version": "1.0.0",
        "license": {"@type": "sc:CreativeWork", "name": "unknown", "description": LICENCE},
        "citeAs": CITATION,
        "distribution": [*(_file(folder, path) for path in files), TEXT_FILES],
        "recordSet": [TEXTS],
    }
    text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8")


def _file(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{path.stat().st_size} B",
        "encodingFormat": ENCODINGS[path.suffix],
        "sha256": file_sha256(path),
    }


def _field(column: pa.Field) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"texts/{column.name}",
        "name": column.name,
        "description": MEANINGS[column.name],
        "dataType": TYPES[column.type],
        "source": {"fileSet": {"@id": "text-files"}, "extract": {"column": column.name}},
    }


TEXT_FILES = {
    "@type": "cr:FileSet",
    "@id": "text-files",
    "name": "text-files",
    "description": "The selected text, one file per shard of the corpus.",
    "encodingFormat": "application/x-parquet",
    "includes": "documents/*.parquet",
}
TEXTS = {
    "@type": "cr:RecordSet",
    "@id": "texts",
    "name": "texts",
    "description": "The selected text, one record per contiguous run or per complete document.",
    "field": [_field(column) for column in FILTERED],
}
