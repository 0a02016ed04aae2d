"""Other formats: what the neighbours write comes in, what they read goes out."""
