"""One adapter per peer; each function does the work of one measurement and returns metrics."""
