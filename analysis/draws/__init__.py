"""Draws of the posterior as ArviZ data, and what they say."""
