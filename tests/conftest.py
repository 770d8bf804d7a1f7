"""One thread for each test process: two cores are busier with several small models than with one spread over both."""

import torch

torch.set_num_threads(1)
