"""Pure functions on numbers and records: no I/O, no clock of their own."""
