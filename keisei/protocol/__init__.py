"""What the application and a worker say to each other: messages, and the ends they use."""
