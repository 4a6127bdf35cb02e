"""Entry points: compose a config, build one typed spec, make one call."""
