"""Closed-form repair: what a cut broke is refitted by least squares on the cut model's own stream, without gradients."""
