"""Worlds to tune models in, and what is done in each alike: settings, runs, results, tables, scores and checks.

rows.py       prompts and answers in token ids -> batches
settings.py   one way to train, and the table of all that are compared: new rivals and presets are added there
rivals.py     rivals that the library does not have
world.py      what a run asks of a world; toy.py and real.py are the two
training.py   one run: a LoRA tuning by one setting at one learning rate from one seed
runner.py     many runs, a resumable file of results, and where they were made
scores.py     the table of token scores that marks.py and counterfactual.py compare
measures.py   areas under ROC curves, ranks, intervals
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))  # tiny_lm.py: pretraining, and the cache
