"""Draw sentences from the prior, or from the latents of given ones.

python jobs/generate.py weights=FOLDER mode=sample num=16
python jobs/generate.py weights=FOLDER mode=reconstruct input=FILE
python jobs/generate.py weights=FOLDER mode=interpolate input=PAIRS steps=8
python jobs/generate.py weights=FOLDER mode=analogy input=TRIPLES
python jobs/generate.py weights=FOLDER mode=complete input=PREFIXES
"""

from __future__ import annotations

import sys
from pathlib import Path

# A script's own folder is on the path, its parent is not: exchange them.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.entry import Config, run_job, spec_values  # noqa: E402
from pipeline.generation import run_generate  # noqa: E402
from pipeline.specs.generate import GenerateSpec  # noqa: E402
from pipeline.storage import Location  # noqa: E402


def main(config: Config) -> None:
    """Build the spec, generate, and print a text a line."""
    spec = GenerateSpec.build(spec_values(config, GenerateSpec), "generate")
    for row in run_generate(spec, Location.parse(config["weights"])):
        print("\n".join(f"{name}: {text}" for name, text in row.items()), flush=True)


if __name__ == "__main__":
    run_job("generate", main)
