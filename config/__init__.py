"""What a YAML may say: the experiment as Determined reads it, and the hyperparameters of its trials."""
