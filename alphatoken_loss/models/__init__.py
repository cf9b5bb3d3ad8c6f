"""What the library knows of a model: its structure, modes and reference, and ways to watch and replay its forward."""
