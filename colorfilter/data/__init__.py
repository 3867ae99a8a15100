"""From text to sequences: shards, documents, samples, tasks and packed tokens."""
