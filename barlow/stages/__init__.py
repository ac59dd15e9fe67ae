"""One file a stage: build, define the step, fit, evaluate. Read before torch, whose start the environment decides."""

import os

# torch's C++ side warns, on stderr and once a rank, of choices that are made on purpose (see pretrain.distribute).
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Threads that wait for work sleep: on cores shared with others, spinning ones slow everything down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
