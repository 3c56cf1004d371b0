"""From a source checkpoint to a stocha checkpoint: copying, refitting, averaging."""
