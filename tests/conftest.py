import os

import torch

# Two threads on tensors of this size only wait for each other; processes that the tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
