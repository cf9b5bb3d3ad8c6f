"""The way in that trains: `AlphaToken` sets a gate in the model for one batch, and masks the gradient that passes."""
