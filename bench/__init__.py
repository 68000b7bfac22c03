"""Benchmarks of each op family against what a user would write without it: ``python -m bench``."""

import os

# Read when torch is imported: the profiler would announce each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

FAMILIES = (
    "gaussian",
    "full_gaussian",
    "importance",
    "likelihood",
    "posterior",
    "vae",
    "categorical",
    "corruption",
    "mixture",
    "cross_entropy",
    "lstm",
    "gru",
    "generation",
    "sparse",
)
