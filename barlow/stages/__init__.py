"""One file a stage: build, define the step, fit, evaluate."""

import os

# torch's C++ side warns, on stderr and once a rank, of choices that are made on purpose (see pretrain.distribute).
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
