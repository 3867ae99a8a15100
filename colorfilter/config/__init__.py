"""What an experiment is: the recipe and its file."""
