"""Scoring a data set for other trainers."""
