"""Tables of README and docs, each made of files in benchmarks/results; `figures.py` writes them into the pages."""

from . import compatibility, costs, fidelity, gain, path, real, recipes, tradeoff, trials
from .base import TABLES

__all__ = ["TABLES", "compatibility", "costs", "fidelity", "gain", "path", "real", "recipes", "tradeoff", "trials"]
