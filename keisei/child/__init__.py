"""What runs inside a worker's process: its entry, its main loop, the fork server it comes from."""
