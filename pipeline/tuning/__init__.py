"""The parts of a search: its space, its progress, its results."""
