"""The paper's comparisons as commands: the same recipe in several variations, on the same tokens, with several seeds."""
