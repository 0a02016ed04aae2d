"""Sbatch templates, found by :mod:`hpc_resume.launch.script`."""
