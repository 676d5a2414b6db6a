"""Networks and texts that are fetched through pip."""
