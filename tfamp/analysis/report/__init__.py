"""`report.html`: everything found about a recipe, and the logs of a run."""
