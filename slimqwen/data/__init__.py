"""The data pipeline: text to packed tokens to rows of training data, with one integer as the cursor."""
