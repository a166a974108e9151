"""Limits: the best that this machine can do, measured rather than assumed."""
