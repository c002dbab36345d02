"""Evaluation of models: loss, divergence from the teacher, MTP acceptance, expert utilisation, benchmarks, speed."""
