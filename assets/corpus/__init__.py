"""Stage 1: sources, shards, the sample of the corpus, and text packed into tokens."""
