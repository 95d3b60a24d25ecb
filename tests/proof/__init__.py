"""Proofs by exhaustion: harnesses that search for a state, an order or a failure that breaks the contract.

Power cuts: `events` <- `recorder`, `disk` <- `session` <- `workloads` <- `crash` <- `planted`.  Running processes:
`kill`, `stress`, `market`; damage: `flips`; beside a dict: `soak`.  `common` is what they share; `python -m
tests.proof` runs them.
"""
