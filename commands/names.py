"""How documents are named on the command line, and the SQL conditions that look them up."""

import re

DOC_ID = re.compile(r"[0-9a-f]{6,20}")  # the first digits of a doc_id
PLACE = re.compile(r"(.+):(\d+)")  # FILE:LINE, or SHARD:POSITION
# Conditions on `documents.parquet`. AT_LINE takes $file and $line, BY_ID takes $doc_id.
AT_LINE = "source_line = $line AND ends_with('/' || source_file, '/' || $file)"
BY_ID = "starts_with(doc_id, $doc_id)"
DOCUMENTS = "documents.parquet"
