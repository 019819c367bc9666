"""Faults on purpose: `python tests/faults --cases 300` injects them at random, and checks what comes of each."""
