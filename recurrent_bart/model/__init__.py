"""Hugging Face classes: encoder, decoder, decoder context, generation and loss."""
