"""From token values to the tokens that are trained on, and other ways to choose them."""
