"""Data preparation, from text to sequences: shards, documents, samples, tasks, packed tokens."""
