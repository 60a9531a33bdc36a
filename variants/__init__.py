"""Other systems and the paper's ablations, built on the files at the root."""
