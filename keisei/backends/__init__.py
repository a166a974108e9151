"""Where a worker runs: inline (same process) or local (a process of its own)."""
