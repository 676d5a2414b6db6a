"""Predictions for the rows of a file: read, predicted and written a chunk at a time."""
