"""What lies on disk: checkpoints by UUID, what trials make once and share, locks, and names on the hub."""
