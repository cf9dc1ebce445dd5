"""The runner's whole space of decisions, enumerated and held against the law; the result is a certificate.

Nothing here is imported before a verb runs: it all needs torch.
"""

from __future__ import annotations


def certify(path: str, *, jobs: int, as_json: bool) -> int:
    """Run every legal state, write the certificate. Exit code 0, or 1 if a state or a piece is wrong."""
    from harness.certify.verb import certify as run

    return run(path, jobs=jobs, as_json=as_json)


def replay(path: str, *, count: int, seed: int, as_json: bool) -> int:
    """Run `count` states of a certificate again, rank by rank. Exit code 0, or 1 if one differs from what it says."""
    from harness.certify.verb import replay as run

    return run(path, count=count, seed=seed, as_json=as_json)
