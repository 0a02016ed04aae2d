"""Login node: from a function or command to a job."""
