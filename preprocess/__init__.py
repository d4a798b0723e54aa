"""Georeferenced scenes and land cover to records."""
