"""Files of cells are read block by block as anndata reads them whole, and what is wrong is said of file and row."""
