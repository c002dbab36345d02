"""Measuring a model on held-out text: loss, distance from its teacher, accepted MTP drafts, expert utilisation."""
