"""What several texts for one prompt say: votes, and the entropy of what they mean."""
