"""Latency and memory of pocketdiffusion, measured from outside in fresh processes."""
