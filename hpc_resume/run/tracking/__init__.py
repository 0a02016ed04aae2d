"""Experiment trackers that know nothing of interruptions: one run in them, and no step twice."""
