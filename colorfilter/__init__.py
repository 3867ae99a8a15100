"""CoLoR-Filter (arXiv 2406.10670): choose pre-training data by conditional minus prior loss.

The modules in the order in which data passes: `recipe`, `documents`, `sampling`, `tokens`,
`models`, `training`, `loss`, `scoring`, `selection`, `leakage`, `evaluation`, `report`.
Nothing here knows Dagster.
"""
