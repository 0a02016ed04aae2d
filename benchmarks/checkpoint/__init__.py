"""Benchmarks of the checkpoint engine against the raw limits and against torch.distributed.checkpoint."""
