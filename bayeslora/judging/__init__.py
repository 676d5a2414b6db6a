"""Whether a written answer is right."""
