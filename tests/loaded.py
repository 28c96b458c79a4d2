"""Imported once by the process that test runs are forked from."""

import datasets
import hydra
import torch._dynamo

import moe_parallel.run

# Closing a half-read stream sleeps for five seconds.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0

__all__ = ["datasets", "hydra", "moe_parallel", "torch"]
