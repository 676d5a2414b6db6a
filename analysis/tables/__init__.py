"""Tables of runs and studies, and verdicts."""
