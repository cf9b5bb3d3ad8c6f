"""The command line, scoring of data sets, pictures and reports. Nothing of the core knows of them."""
