"""Proofs by exhaustion: harnesses that search for a state, an order or a failure that breaks the contract."""
