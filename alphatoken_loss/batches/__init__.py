"""Every form of batch that comes in, read into one."""
