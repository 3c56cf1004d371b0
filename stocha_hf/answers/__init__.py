"""A model's answers to many prompts at once: the cache, the choice of tokens, the loop, and files of answers."""
