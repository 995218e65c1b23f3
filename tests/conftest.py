"""What every test process starts with."""

import os

# One thread each: tiny models' pools cost more than they give, sums repeat to the bit, and a process that has not
# woken a pool can be forked. Tests of several threads ask for them by name.
os.environ["OMP_NUM_THREADS"] = "1"

# Triton's kernels run in its interpreter, which it must know before anything imports it.
os.environ.setdefault("TRITON_INTERPRET", "1")
