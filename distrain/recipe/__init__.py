"""How a network is trained: optimizer, schedule, loss."""
