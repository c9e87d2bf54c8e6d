"""Training the zoo's models, and measuring and describing them."""
