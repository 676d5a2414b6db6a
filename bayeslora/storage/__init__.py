"""What is on disk: adapter folders, run folders, and what is checked before either is believed."""
