"""The command line: parse, one library call, print. What a verb needs is imported when it runs."""

from hpc_resume.cli import checkpoints, doctor, jobs, rehearse
from hpc_resume.cli.common import main

__all__ = ["checkpoints", "doctor", "jobs", "main", "rehearse"]
