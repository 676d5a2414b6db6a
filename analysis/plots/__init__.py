"""Pictures: numbers and Axes in, Axes out."""
