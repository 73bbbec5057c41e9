"""`python -m distrain bench gpu`: everything that must be measured on a GPU, in one command of at most nine minutes."""
