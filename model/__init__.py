"""The decoder, its attention, losses, loading, export, generation and tokenizer; it knows neither data nor loop."""
