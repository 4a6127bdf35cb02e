"""Turn text into tokenised shards.

    python jobs/preprocess.py corpus=text corpus.train=A.txt corpus.valid=B.txt corpus.test=C.txt \\
        tokenizer=bpe tokenizer.vocab_size=8000 storage=DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

# A script's own folder is on the path, its parent is not: exchange them.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.entry import Config, ensure, run_job, spec_values  # noqa: E402
from pipeline.specs import PreprocessSpec  # noqa: E402


def main(config: Config) -> None:
    """Build the spec and run the stage."""
    spec = PreprocessSpec.build(spec_values(config, PreprocessSpec), "preprocess")
    ensure("preprocess", spec, {}, config["storage"])


if __name__ == "__main__":
    run_job("preprocess", main)
