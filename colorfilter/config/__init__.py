"""The definition of an experiment: the recipe and its YAML file."""
