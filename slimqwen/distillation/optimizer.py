"""The optimiser over a student's parameters."""

import torch

from slimqwen.recipe import DistilRecipe


def build_optimizer(parameters: dict[str, torch.Tensor], recipe: DistilRecipe) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, not on norms, biases, A_log and dt_bias, which are all vectors."""
    trained = [p for p in parameters.values() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, eps=1e-8, fused=True)
