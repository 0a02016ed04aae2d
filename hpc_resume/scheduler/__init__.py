"""All that a scheduler says or is told. Knows no torch."""
