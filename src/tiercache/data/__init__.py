"""Data sets: an open version, the records of views and joined data sets, and how their columns are served."""
