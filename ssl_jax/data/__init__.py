"""Images and labels: sources, sampling order, views and augmentation."""
