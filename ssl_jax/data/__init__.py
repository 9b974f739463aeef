"""Images and labels: sources, the order they are seen in, their views and augmentation."""
