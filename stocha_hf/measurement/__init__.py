"""What a model is worth: perplexity, zeros, speed, samples, and the pictures of each."""
