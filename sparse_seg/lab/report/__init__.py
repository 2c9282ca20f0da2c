"""Tables, plots, pictures and self-contained HTML pages that show results."""
