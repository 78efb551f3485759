"""What is around trials: the runner, results, dry run and report page."""
