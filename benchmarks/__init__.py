"""Measurements; each prints ratios that were measured in turn in one run."""
