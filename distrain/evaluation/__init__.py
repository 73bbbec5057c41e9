"""What a classifier gets right and wrong: predictions as a table, and everything else as functions of that table."""
