"""What an inference, a vote and a gradient cost."""
