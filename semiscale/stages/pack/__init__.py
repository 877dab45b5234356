"""Pack: copy the selected images into shuffled WebDataset tars."""
