"""From losses to selections and datasets."""
