"""Results on disk and on a page."""
