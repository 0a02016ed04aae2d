"""Where a run comes from: environment, source, data, configuration."""
