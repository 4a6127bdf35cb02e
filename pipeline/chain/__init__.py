"""Jobs: graphs of stages, planned, started in processes of their own, and followed."""
