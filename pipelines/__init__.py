"""Records to batches on the training device."""
