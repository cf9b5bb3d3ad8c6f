"""From a batch's forward and backward to token values."""
