"""The Hub: staging the folder of a model, its card, and pushing it in one commit."""
