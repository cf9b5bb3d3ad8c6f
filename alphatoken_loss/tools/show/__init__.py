"""Token values to look at."""
