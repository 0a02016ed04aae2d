"""The command line: parse, one library call, print. What a verb needs is imported when it runs."""

from hpc_resume.cli import branches, checkpoints, data, doctor, jobs, provenance, rehearse
from hpc_resume.cli.common import main

__all__ = ["branches", "checkpoints", "data", "doctor", "jobs", "main", "provenance", "rehearse"]
