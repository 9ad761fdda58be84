"""What images are measured on: one file per suite."""
