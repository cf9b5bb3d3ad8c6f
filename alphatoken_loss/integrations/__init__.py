"""Token values inside other trainers' tools; each module imports the tool it is for."""
