"""What exists: the lineage, one module per stage, built from a recipe by factories."""
