"""One folder per system; a system never imports another."""
