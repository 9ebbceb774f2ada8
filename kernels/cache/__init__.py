"""Writing, copying and gathering blocks."""
