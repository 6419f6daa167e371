"""Files that hold tensors, at the level of bytes: where each tensor lies, read by mapping those bytes, written as a stream."""
