"""Whether what resumes is what was interrupted: see ``__main__``."""
