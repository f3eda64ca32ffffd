"""Documents of tokens into batches that the ranks of a sequence share."""
