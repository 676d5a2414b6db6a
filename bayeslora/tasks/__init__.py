"""Data sets by name or from files, and how they are encoded."""
