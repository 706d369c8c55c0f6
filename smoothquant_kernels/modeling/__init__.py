"""Looking at a model and changing it: its layers, what reads what, how it is run, what was done to it."""
