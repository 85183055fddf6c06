"""A program that has used gloo ends as its code says, not with an abort."""

import subprocess
import sys

import pytest

ENDS_WHILE_A_THREAD_LETS_GO = """
import sys
import torch
import torch.distributed as dist
import sparsetrain as st

st.weight_shards(torch.nn.Linear(1, 1))
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
held = dist.group.WORLD  # as a model in DDP holds it, to the end
dist.destroy_process_group()

sys.setswitchinterval(1000)  # from here on no other thread gets Python's global lock, unless this one sleeps
tensor = torch.ones(4)
held.allreduce([tensor])
for _ in range(20_000_000):  # the thread has reduced, and waits for the lock to let go of the tensor
    pass
sys.exit(3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads of gloo are seen in Linux's /proc")
def test_it_ends_though_a_thread_of_gloo_still_holds_a_tensor() -> None:
    program = [sys.executable, "-c", ENDS_WHILE_A_THREAD_LETS_GO]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (3, "")
