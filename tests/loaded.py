"""Imported once by the process that test runs are forked from."""

import hydra
import torch._dynamo

import moe_parallel.run

__all__ = ["hydra", "moe_parallel", "torch"]
