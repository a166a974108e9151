"""What the machine can do at best: measured, never assumed."""
