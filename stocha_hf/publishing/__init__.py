"""The model card, its tables of measurements, and the upload to the Hub."""
