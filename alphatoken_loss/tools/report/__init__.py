"""A record of a run, and a page made from it."""
