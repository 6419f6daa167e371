"""Models as plain numbers, and for each family one description of its tensors: names, shapes, how they are split, their
names and layouts in other formats. Training, conversion and generation are held to it."""
