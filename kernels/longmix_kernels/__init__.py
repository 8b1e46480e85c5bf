"""The engines: attention, linear and delta. They import torch and triton and nothing else."""
