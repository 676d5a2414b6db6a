"""What a study can compare, one file a family."""
