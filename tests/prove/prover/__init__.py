"""Proves what the guard's compiled BPF programs can do to a frame. See ../README.md."""
