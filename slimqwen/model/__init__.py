"""Transformers' backbone with our MTP module: loading, running it one kernel or another, watching its routers."""
