"""Examples on their way into a network: checked, padded and put into batches."""
