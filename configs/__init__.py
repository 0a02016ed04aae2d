"""Site configurations: one commented YAML file per kind of site."""
