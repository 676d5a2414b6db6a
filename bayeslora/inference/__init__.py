"""What is done with a posterior: predict, write, attribute, diagnose."""
