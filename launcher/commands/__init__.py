"""One file per verb; none of them imports torch."""
