"""What networks are for: a task is a loss, figures that judge, and what is known of each image (docs/adr/0018)."""
