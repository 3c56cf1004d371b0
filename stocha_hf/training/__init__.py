"""Training under an activation schedule, on trl's SFTTrainer."""
