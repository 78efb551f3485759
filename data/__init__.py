"""What the models learn from: where rows come from, the formats they may have, and what length limits cut off."""
