"""CoLoR-Filter (arXiv 2406.10670): choose pre-training data by conditional minus prior loss.

The packages in the order in which data passes through them: `config`, `data`, `models`, `training`,
`scoring`, `selection`, `evaluation`. `compute` and `storage` serve all of them. Nothing in this
package depends on Dagster.
"""

import os

# By default OpenMP's threads spin while they wait for each other. When anything else runs on the
# cores, spinning makes a training step up to ten times slower. OpenMP reads these variables when
# torch loads it.
WAIT_ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
if not WAIT_ASLEEP.keys() & os.environ.keys():
    os.environ.update(WAIT_ASLEEP)
