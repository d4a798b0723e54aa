"""What ``python -m geokr.doctor`` looks at, one subject a module. Importing them needs Python's own library only."""
