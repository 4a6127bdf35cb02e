"""What keeps a test that hangs from hanging the suite."""

HANG_S = 1200
"""Seconds after which a job that has not ended is taken to hang: no measure of how fast it is."""
