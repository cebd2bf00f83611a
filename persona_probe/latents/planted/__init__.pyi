from .run import PlantedSettings as PlantedSettings
from .run import run_planted as run_planted
from .table import format_table as format_table
