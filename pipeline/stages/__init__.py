"""The stages: `run_<stage>(spec, inputs, output) -> figures`, each in a module of its own."""
