"""How a network learns: mixing, loss, optimizer, schedule, averages; configurations of published results."""
