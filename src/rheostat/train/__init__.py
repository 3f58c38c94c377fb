"""Training through the Hugging Face `Trainer`: one loop for every method."""
