"""The assets and asset checks of every stage, built from a recipe by factory functions."""
