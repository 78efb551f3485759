"""What one trial is: its context on and off a cluster, its callback and its model."""
