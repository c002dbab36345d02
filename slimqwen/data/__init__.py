"""From text to packed tokens to rows of training data, with one integer as the cursor."""
