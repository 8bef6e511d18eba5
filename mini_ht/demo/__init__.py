"""A local page on which one draws a few symbols and gets a classifier for them, `mini-ht demo`."""
