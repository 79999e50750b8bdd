"""What turns conversations into packed rows of token ids; nothing here knows the model or the training loop."""
