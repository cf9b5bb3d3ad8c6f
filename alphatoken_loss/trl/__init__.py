"""TRL's trainers with token values inside. The only room that imports trl's trainers."""
