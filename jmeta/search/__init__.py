"""Architecture search as meta-learning: cells, the search, and networks made of what it finds."""

from jmeta.search.architecture import darts, genotype, random_genotype, search_tasks
from jmeta.search.cells import CellNetwork, Genotype
