"""The Hub: staging a model's folder, its card, and pushing in one commit."""
