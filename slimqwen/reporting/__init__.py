"""Presentation of a run's artefacts: the HTML report, the comparison page, the model card, the final table."""
