"""The decoder, its attention, losses, loading, export, generation and tokenizer; nothing here knows the data or the loop."""
