"""Layouts of other libraries, read where they lie: Parquet, MDS, WebDataset, Megatron and Arrow files."""
