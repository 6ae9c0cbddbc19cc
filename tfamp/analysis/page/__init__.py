"""What a report is made of: parts, plots, and the page itself."""
