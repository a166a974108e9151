"""How bytes move between two processes: queues, shared-memory rings, versioned weights."""
