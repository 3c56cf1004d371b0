"""Checkpoint folders without torch: what they hold, whether they are whole, how they are hashed and written."""
