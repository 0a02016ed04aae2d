"""Reads run directories: status, tables, figures. Never writes into them."""
