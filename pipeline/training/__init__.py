"""Training: the worker's loop and its parts."""
