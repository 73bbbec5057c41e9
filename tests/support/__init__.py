"""What tests share: processes, synthetic data, servers, simulated hosts."""
