"""Work over all cells in bounded memory: shared by processes, sorted on disk, in any order."""
