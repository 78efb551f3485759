"""Make any model one plain folder that a server takes, and prove that it answers as in training."""
