"""Losses, log-probabilities and the KL penalty."""
