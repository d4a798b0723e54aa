"""Land-cover product tables, as package data."""
