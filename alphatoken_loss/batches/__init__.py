"""Every form of batch that comes in -> one view of it."""
