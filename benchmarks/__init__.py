"""Benchmarks of LogKV, and the pure-Python store that they measure it against."""
