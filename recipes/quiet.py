"""Imported first: silences what libraries say at import or start and a user of the recipes cannot act on."""

import logging
import warnings

# A kernel package that bitsandbytes would use on a CPU if it were there; without it, its own code does the same.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# TRL's arguments have the old name of this one, whatever a recipe passes.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*is deprecated")
