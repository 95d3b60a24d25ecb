"""What a run found, as it is kept in JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.workloads import WHOLE, Opened, Samples


@dataclass(frozen=True, slots=True)
class Measured:
    """One shape: samples of the workloads, openings in fresh processes, size of the index."""

    shape: str
    keys: int
    samples: Samples
    openings: list[Opened]
    index_bytes: float | None  # a key; None if it was not asked for, as below

    def median(self, workload: str, engine: str) -> float | None:
        """Of the rounds; None if this was not measured."""
        found = self.samples.get(workload, {}).get(engine)
        return median(found) if found else None

    def ratio(self, workload: str, one: str, other: str) -> float | None:
        """The median of the ratios within a round: a busy round then stands against itself.

        None if that was not measured, or if it is of whole calls, for engines differ in the number of keys.
        """
        samples = self.samples.get(workload, {})
        if workload in WHOLE or one not in samples or other not in samples:
            return None
        return median(first / second for first, second in zip(samples[one], samples[other], strict=True))

    def opened(self, engine: str, killed: bool) -> list[Opened]:
        """The openings of an engine, by the number of keys."""
        found = (opened for opened in self.openings if (opened.engine, opened.killed) == (engine, killed))
        return sorted(found, key=lambda opened: opened.keys)


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that was measured, where and how."""

    machine: str
    logkv: str
    rounds: int
    seed: int
    one_key: int | None  # bytes on the device of a store of one short key
    shapes: list[Measured]

    def of(self, shape: str) -> Measured | None:
        """A shape of the run."""
        return next((measured for measured in self.shapes if measured.shape == shape), None)

    def save(self, file: Path) -> None:
        """Write it as JSON."""
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> Run:
        """What `save` wrote; ValueError if it is something else."""
        try:
            found = json.loads(file.read_text())
            return cls(**found | {"shapes": [_measured(shape) for shape in found["shapes"]]})
        except (TypeError, KeyError) as problem:
            raise ValueError(f"{file} holds no results of these benchmarks: {problem}") from None


def _measured(found: dict[str, Any]) -> Measured:
    openings: Iterable[dict[str, Any]] = found["openings"]
    return Measured(**found | {"openings": [Opened(**opened) for opened in openings]})
