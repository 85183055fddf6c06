"""All ranks make the same plans: in other processes, with other hash seeds, on CPUs with other vector units."""

import os
import subprocess
import sys

import numpy as np

from sparsetrain.moe.placement import Topology, dispatch, materialise_layers, own_evenly, reshard_owners, scenario


def plan() -> str:
    """Fingerprints of plans of all kinds, over loads that leave room for ties."""
    topology, owners_LE = Topology(8, 4), own_evenly(3, 20, 8)
    found = []
    for name in ("L0", "L2", "L4", "L6"):
        loads = [scenario(name, 20, 8, seed=layer, owner_E=owner_E) for layer, owner_E in enumerate(owners_LE)]
        counts_LSE = np.stack([load.counts_SE(0, 60) for load in loads])
        load_LE = counts_LSE.sum(axis=1)
        found.append(reshard_owners(load_LE, owners_LE, topology).ravel().tolist())
        for method in ("best", "paper"):
            placements = materialise_layers(load_LE / 7, owners_LE, topology, slots=1, hot=6, method=method)
            for split in ("capacity", "paper"):
                found += [
                    dispatch(counts_SE, placement, topology, method=split).fingerprint
                    for counts_SE, placement in zip(counts_LSE, placements, strict=True)
                ]
    return repr(found)


def test_other_processes_make_the_same_plans():
    environment = os.environ | {
        "PYTHONHASHSEED": "12345",
        "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512_SKX AVX2 FMA3",
        "PYTHONWARNINGS": "ignore",
    }
    run = [sys.executable, __file__]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == plan()


if __name__ == "__main__":
    print(plan())
