"""From the artefacts of a run to pages a person reads: the HTML report, the model card, the final table."""
