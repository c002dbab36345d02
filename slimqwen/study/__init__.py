"""The paper's comparisons as studies: variations of one recipe, trained on the same tokens, with several seeds."""
