"""A model one layer at a time: its layers apart, their weights, the text's hidden states between them."""
