"""What is measured on held-out rows: intervals of a metric, and the log-ratios of preference pairs."""
