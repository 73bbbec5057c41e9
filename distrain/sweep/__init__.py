"""Design spaces: sample networks, train each briefly, compare the distributions of their errors, choose."""
