"""What a RiskMonitor computes without a Trainer: what to expect, how sure it is, and what the last line says."""
