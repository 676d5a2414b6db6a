"""What to do with predictions: sets of labels to answer with, and examples to ask people about."""
