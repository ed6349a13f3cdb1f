"""The studies of TLC's paper, on any network and data: each gives a table and a picture."""
