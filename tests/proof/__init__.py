"""Proofs by exhaustion: harnesses that search for a state, an order or a failure that breaks the contract.

Power cuts: `events` <- `recorder`, `disk` <- `session` <- `workloads` <- `crash` <- `planted`, and of a repair and a backup
`repairs`, `backups`.  Running processes: `kill`, `stress`, `market`.  What fails: `failures`, with `shim.c`.  Damage:
`flips`; any bytes: `fuzz`, with `fuzz_*`.  Beside a dict: `soak`.  `common` is what they share; `python -m tests.proof`
runs them within one budget.
"""
