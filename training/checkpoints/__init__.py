"""How a run gets to the disk and back: files of tensors, manifests, and the directory that is published whole."""
