"""What is done with a trained dictionary: splicing, figures, dashboards."""
