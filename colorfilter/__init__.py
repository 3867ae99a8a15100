"""CoLoR-Filter (arXiv 2406.10670): choose pre-training data by conditional minus prior loss.

The modules in the order in which data passes: `recipe`, `documents`, `sampling`, `tokens`,
`models`, `training`, `loss`, `scoring`, `selection`, `leakage`, `evaluation`, `report`.
Nothing here knows Dagster.
"""

import os

# OpenMP's threads spin while they wait for each other. As soon as anything else runs on the cores,
# that makes a training step up to ten times slower. OpenMP reads these when torch loads it.
WAIT_ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
if not WAIT_ASLEEP.keys() & os.environ.keys():
    os.environ.update(WAIT_ASLEEP)
