"""The certificate: every legal state with its coefficients and its ledger, in a file that others can check.

One JSON object, gzipped, with two spaces of states: "decisions" and "dispatch". A state is a layer and a call, each the
number of its place in the product of its axes (the last axis fastest). Many layers share a table of calls, many calls
their coefficients, so tables stand in lists and are named by their place. The hash is over all the rest.
`reference/certificate.py` checks such a file and shares no line with this one.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from harness import __version__
from harness.certify import states
from harness.certify.dispatch import axes
from harness.certify.walk import Walked
from harness.errors import UsageError

FORMAT = "moe-harness certificate 2"
SPACES = {
    "decisions": (states.LAYER_AXES, states.CALL_AXES),
    "dispatch": (axes.LAYER_AXES, axes.CALL_AXES),
}


def certificate(walks: Mapping[str, Iterable[Walked]], pieces: list[list[str]]) -> dict[str, Any]:
    """The body without its hash. walks: of each space.    pieces: the cases that certify routers and experts, and what
    each showed.
    """
    return {
        "format": FORMAT,
        "harness": __version__,
        "torch": torch.__version__,
        "routed_scaling_factor": states.S,
        **{name: _space(name, walks[name]) for name in SPACES},
        "pieces": pieces,
    }


def _space(name: str, walks: Iterable[Walked]) -> dict[str, Any]:
    """All that the walks over one space found, each list of numbers once."""
    coefficients: dict[Any, int] = {}
    ledgers: dict[Any, int] = {}
    tables: dict[Any, int] = {}
    layers: list[tuple[int, int]] = []
    for walked in walks:
        values = [coefficients.setdefault(each, len(coefficients)) for each in walked.coefficients]
        calls = [ledgers.setdefault(each, len(ledgers)) for each in walked.ledgers]
        places = []
        for table in walked.tables:
            whole = tuple((call, values[value], calls[ledger]) for call, value, ledger in table)
            places.append(tables.setdefault(whole, len(tables)))
        layers += [(code, places[table]) for code, table in walked.layers]
    return {
        **_told(name),
        "coefficients": list(coefficients),
        "ledgers": list(ledgers),
        "tables": list(tables),
        "layers": sorted(layers),
    }


def _told(name: str) -> dict[str, list[list[Any]]]:
    """The axes of a space, as a certificate has them."""
    layer_axes, call_axes = SPACES[name]
    return {
        "layer_axes": [[axis, list(values)] for axis, values in layer_axes.items()],
        "call_axes": [[axis, list(values)] for axis, values in call_axes.items()],
    }


def digest(body: dict[str, Any]) -> str:
    """sha256 of the body as compact JSON with sorted keys, its hash left out."""
    return hashlib.sha256(_bare(body).encode()).hexdigest()


def _bare(body: dict[str, Any]) -> str:
    bare = {name: value for name, value in body.items() if name != "hash"}
    return json.dumps(bare, sort_keys=True, separators=(",", ":"))


def check_writable(path: str) -> None:
    """UsageError before the work is done, and not after it."""
    folder = Path(path).absolute().parent
    if Path(path).is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UsageError(
            f"--output {path}: expected a file in a folder that is there and can be written. "
            "Type --output certificate.json.gz"
        )


def write(path: str, body: dict[str, Any]) -> int:
    """The number of bytes. Written beside and renamed, so that no half of a certificate ever stands there."""
    bare = _bare(body)
    text = f'{bare[:-1]},"hash":"{hashlib.sha256(bare.encode()).hexdigest()}"}}'
    packed = gzip.compress(text.encode(), 6, mtime=0)
    beside = Path(f"{path}.{os.getpid()}.new")
    try:
        beside.write_bytes(packed)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return len(packed)


def read(path: str) -> dict[str, Any]:
    """The body. UsageError if there is none, if it is damaged, or if it speaks of another space of states."""
    again = f"Make it anew: moe-harness certify --output {path}"
    try:
        body = json.loads(gzip.decompress(Path(path).read_bytes()))
    except FileNotFoundError:
        raise UsageError(f"--output {path}: no such certificate, so there is nothing to replay. {again}") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UsageError(f"--output {path}: cannot be read as a certificate: {error}. {again}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise UsageError(f"--output {path}: expected the format {FORMAT!r}. {again}")
    if body.get("hash") != digest(body):
        raise UsageError(f"--output {path}: its hash is not that of its content, somebody has changed it. {again}")
    if any({key: body.get(name, {}).get(key) for key in _told(name)} != _told(name) for name in SPACES):
        raise UsageError(
            f"--output {path}: made by harness {body.get('harness')}, whose states are other ones. {again}"
        )
    return body


def check(path: str) -> str:
    """What to type to have the file judged by code that shares nothing with this."""
    return f"{Path(sys.executable).name} -m reference.certificate {path}"
