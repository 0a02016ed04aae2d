"""Compute node: a training run inside its job."""
